"""Several compressions one after another in one fit."""

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, TQDMProgressBar
from support.callbacks import Interrupt, short
from support.models import CausalLM, assert_same_state, loader, state_of, tiny_llama, token_batches, trainer
from torch.utils.data import DataLoader, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from zssvd_lightning import FactorRecovery, LoRARecovery, LowRankPrehab, Phase, ZSSVDCallback, scheduled_steps
from zssvd_lightning.errors import BudgetError, CheckpointError, ConfigError, UnfinishedError, UnsupportedTrainingError
from zssvd_lightning.model.adapters import on
from zssvd_lightning.serialization.specs import ranks_of
from zssvd_lightning.strategies import SingleDeviceAdapter

LORA = LoRARecovery(rank=1, lr=1e-3, clip_rank=True)
BATCHES = token_batches(40)
SECOND_KEY = "ZSSVDCallback{'compression': 2}"
STARTS = (1, 8)
"""Steps at which the compressions start. Each takes four batches."""


def compressing(prune_ratio, start_step, **settings):
    defaults = {"calibration_batches": 2, "correction_batches": 1, "fresh_moments": False, "line_search": True}
    return short(prune_ratio=prune_ratio, start_step=start_step, **(defaults | settings))


def pair(first=None, second=None):
    return [compressing(0.2, STARTS[0], **(first or {})), compressing(0.4, STARTS[1], **(second or {}))]


def dense_module():
    torch.manual_seed(0)
    return CausalLM(tiny_llama())


def fitted(module, *callbacks, ckpt_path=None, **settings):
    run = trainer(*callbacks, **({"max_steps": 16, "max_epochs": -1} | settings))
    run.fit(module, StatefulDataLoader(BATCHES, batch_size=None), ckpt_path=ckpt_path)
    return run


class Sees(L.Callback):
    """Notes the phases of the compressions and what the progress bar shows, at every batch."""

    def __init__(self, callbacks):
        self.callbacks, self.phases, self.bar, self.recovering = callbacks, [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.phases.append(tuple(callback.phase for callback in self.callbacks))
        self.recovering.append([each.report and each.report.seconds.get("recover", 0.0) for each in self.callbacks])
        if trainer.progress_bar_callback is not None:
            self.bar.append(trainer.progress_bar_callback.get_metrics(trainer, pl_module))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A fit with LoRA after the first compression and trained factors after the second, saved at every step."""
    folder, module = tmp_path_factory.mktemp("whole"), dense_module()
    callbacks = recovering()
    seen = Sees(callbacks)
    saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    run = fitted(module, *callbacks, seen, saving, enable_checkpointing=True)
    return folder, module, callbacks, seen, run


def recovering():
    return pair({"recovery": LORA}, {"recovery": FactorRecovery(lr=1e-3)})


def test_the_second_starts_after_the_first_has_ended_and_compresses_further(whole):
    _, module, (first, second), seen, run = whole
    assert (first.phase, second.phase) == (Phase.DONE, Phase.DONE)
    assert all(phases[0] is Phase.DONE for phases in seen.phases if phases[1] is not Phase.WAIT)
    ended = seen.phases.index((Phase.RECOVER, Phase.WAIT))
    assert set(seen.phases[ended:8]) == {(Phase.RECOVER, Phase.WAIT)}
    assert seen.phases[8] == (Phase.DONE, Phase.CALIBRATE)
    assert 0 < seen.recovering[6][0] < seen.recovering[7][0] == first.report.seconds["recover"]
    assert first.report.reached >= 0.2
    assert second.report.reached >= 0.4
    assert second.report.parameters_before == first.report.parameters_after
    before = {name: layer.rank for name, layer in first.report.layers.items() if layer.rank is not None}
    now = ranks_of(module)
    assert now == {name: layer.rank for name, layer in second.report.layers.items() if layer.rank is not None}
    assert before
    assert all(now[name] <= rank for name, rank in before.items())
    assert not on(module)
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert (first.recovers_from, second.recovers_from) == (5, 12)
    names = {name for name in run.callback_metrics if name.startswith("zssvd")}
    assert {name.replace("zssvd2/", "zssvd/") for name in names if "2/" in name} == {n for n in names if "2/" not in n}
    assert run.callback_metrics["zssvd/pruned"] == pytest.approx(first.report.reached)
    assert run.callback_metrics["zssvd2/pruned"] == pytest.approx(second.report.reached)


@pytest.mark.parametrize("step", [2, 8, 11, 14])
def test_a_fit_goes_on_from_any_checkpoint_to_the_same_weights(whole, step):
    folder, module, callbacks, *_ = whole
    path = folder / f"step={step}.ckpt"
    assert {"ZSSVDCallback", SECOND_KEY} <= torch.load(path, weights_only=True)["callbacks"].keys()
    resumed, again = dense_module(), recovering()
    fitted(resumed, *again, ckpt_path=path)
    assert_same_weights(resumed, module)
    for one, other in zip(again, callbacks, strict=True):
        assert one.report.layers == other.report.layers
        assert one.report.losses == other.report.losses
        assert one.recovers_from == other.recovers_from


def assert_same_weights(one, other):
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_checkpoints_load_for_validation_and_lost_callbacks_are_refused(whole):
    folder, *_ = whole
    for step in (7, 9, 14):
        path, other = folder / f"step={step}.ckpt", dense_module()
        trainer(*recovering()).validate(other, loader(BATCHES[:1]), ckpt_path=path, verbose=False)
        assert ranks_of(other)
    module = dense_module()
    before = state_of(module)
    with pytest.raises(CheckpointError, match=r"several compressions.*lacks ZSSVDCallback\{'compression': 2\}; go on"):
        fitted(module, recovering()[0], ckpt_path=folder / "step=9.ckpt")
    assert_same_state(before, state_of(module))


def test_limits_add_up_and_both_rank_afresh(tmp_path):
    module = dense_module()
    callbacks = pair({"extend_training": True}, {"extend_training": True})
    ranking = ModelCheckpoint(tmp_path, filename="best", monitor="val_loss", save_last=True)
    stopping, scores = EarlyStopping("val_loss", patience=100), []
    for callback in callbacks:
        callback.on_compressed = lambda *_: scores.append(float(stopping.best_score))
    seen = Sees(callbacks)
    bar = TQDMProgressBar()
    bar.disable()
    settings = {"max_steps": 10, "val_check_interval": 2, "enable_checkpointing": True, "enable_progress_bar": True}
    run = trainer(*callbacks, seen, ranking, stopping, bar, **(settings | {"max_epochs": -1}))
    run.fit(module, loader(BATCHES), loader(BATCHES[:1]))
    assert scores == [torch.inf] * 2
    assert run.global_step == 18
    assert run.max_steps == 10
    assert len(seen.phases) == 18
    titles = [{name: text for name, text in shown.items() if name.startswith("compression")} for shown in seen.bar]
    assert titles[1] == {"compression": "calibrate 1/2"}
    assert titles[7] == {"compression": "recover"}
    assert titles[8] == {"compression 2": "calibrate 1/2"}
    assert all(len(shown) == 1 for shown in titles)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"best-dense.ckpt", "last-dense.ckpt", "best-compressed.ckpt", "last-compressed.ckpt"} <= names
    saved = torch.load(ranking.best_model_path, weights_only=True)["callbacks"]
    assert saved[SECOND_KEY]["phase"] == "recover"


def test_a_second_fit_with_the_same_callbacks_trains_on_and_another_module_is_compressed():
    module, callbacks = dense_module(), pair()
    fitted(module, *callbacks)
    ranks = ranks_of(module)
    fitted(module, *callbacks, max_steps=2)
    assert ranks_of(module) == ranks
    fitted(other := dense_module(), *callbacks)
    assert ranks_of(other) == ranks
    copied = copy.deepcopy(callbacks[1])
    assert copied.state_key == SECOND_KEY
    assert copied.fit.turn.earlier == ()


def test_an_exception_in_the_second_leaves_what_the_first_has_made():
    module, callbacks = dense_module(), recovering()
    methods = {name: module.__dict__.get(name) for name in ("training_step", "configure_optimizers")}
    with pytest.raises(ConnectionError):
        fitted(module, *callbacks, Interrupt(9))
    assert (callbacks[0].phase, callbacks[1].phase) == (Phase.DONE, Phase.WAIT)
    assert ranks_of(module) == {name: each.rank for name, each in callbacks[0].report.layers.items() if each.rank}
    assert {name: module.__dict__.get(name) for name in methods} == methods
    assert "on_load_checkpoint" not in module.__dict__


def test_a_fit_that_ends_before_the_second_has_is_an_error():
    class Stops(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 7

    with pytest.raises(UnfinishedError, match="in phase 'wait' of compression 2"):
        fitted(dense_module(), *pair(), Stops(), min_epochs=0)


def test_a_checkpoint_of_a_single_compression_loads_beside_a_second_one(tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fitted(dense_module(), pair()[0], saving, max_steps=6, enable_checkpointing=True)
    path = tmp_path / "step=6.ckpt"
    assert [key for key in torch.load(path, weights_only=True)["callbacks"] if "ZSSVD" in key] == ["ZSSVDCallback"]
    module, callbacks = dense_module(), pair()
    fitted(module, *callbacks, ckpt_path=path)
    assert callbacks[1].report.reached >= 0.4


def test_schedules_of_the_first_recovery_end_where_the_second_compression_starts():
    told = []

    class Asks(CausalLM):
        def configure_optimizers(self):
            told.append((self.global_step, scheduled_steps(self.trainer)))
            return super().configure_optimizers()

    fitted(Asks(tiny_llama()), *pair())
    assert told == [(0, 16), (5, 3), (12, 4)]


def test_fast_dev_run_goes_through_both_and_says_that_the_first_recovery_trains_no_step(caplog):
    callbacks = recovering()
    fitted(dense_module(), *callbacks, fast_dev_run=2)
    assert [callback.phase for callback in callbacks] == [Phase.DONE] * 2
    assert caplog.text.count("the recovery of compression 1 has trained no step") == 1


def test_windows_that_epochs_cut_off_count_as_whole_steps():
    settings = {"limit_train_batches": 5, "accumulate_grad_batches": 4, "max_steps": 12}
    with pytest.raises(UnsupportedTrainingError, match=r"step 6, but compression 1 takes from step 3 to step 7; "):
        fitted(dense_module(), compressing(0.2, 3), compressing(0.4, 6), **settings)
    callbacks = [compressing(0.2, 3), compressing(0.4, 7)]
    fitted(dense_module(), *callbacks, **settings)
    assert [callback.recovers_from for callback in callbacks] == [7, 11]


@pytest.mark.parametrize("known", [False, True])
def test_a_first_recovery_whose_schedule_has_no_known_end_is_told(caplog, known):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(BATCHES)

    callbacks = [compressing(0.2, 1, recovery=LORA), compressing(0.4, 0, start_epoch=1)]
    run = trainer(*callbacks, Interrupt(1), max_steps=16, max_epochs=2, limit_train_batches=8 if known else None)
    with pytest.raises(ConnectionError):
        run.fit(dense_module(), DataLoader(Stream(), batch_size=None))
    assert ("compression 2 starts at epoch 1, and the length of an epoch is not known" in caplog.text) != known


def test_later_compressions_let_go_of_the_model_until_they_start():
    class Asks(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            touched.append([callback.run.life.has_touched for callback in trainer.callbacks[1:3]])

    touched = []
    with pytest.raises(ConnectionError):
        fitted(dense_module(), *pair(), compressing(0.6, 12), Asks(), Interrupt(1))
    assert touched == [[False] * 2]


class Constant(ZSSVDCallback):
    @property
    def state_key(self):
        return "mine" if self.fit.turn.number else str(id(self))


REFUSED = {
    "order": (
        lambda: [compressing(0.2, 8), compressing(0.4, 1)],
        UnsupportedTrainingError,
        "in the order in which they",
    ),
    "overlap": (
        lambda: [compressing(0.2, 1), compressing(0.4, 4)],
        UnsupportedTrainingError,
        r"2 of the Trainer would start at step 4, but compression 1 takes from step 1 to step 5.*start_step=5\)",
    ),
    "no step to recover": (
        lambda: [compressing(0.2, 1, recovery=LORA), compressing(0.4, 5)],
        UnsupportedTrainingError,
        r"from step 1 to step 6, with one step of its recovery.*start_step=6\)",
    ),
    "key": (
        lambda: [Constant(0.2), Constant(0.4)],
        UnsupportedTrainingError,
        r"have the same state_key \('mine'\).*do not override",
    ),
    "prehab": (lambda: [*pair(), LowRankPrehab(1)], UnsupportedTrainingError, "LowRankPrehab .* leave it out"),
    "checkpoints": (
        lambda: [*pair(), compressing(0.6, 12), ModelCheckpoint(monitor="zssvd2/loss_after", mode="min")],
        UnsupportedTrainingError,
        "ModelCheckpoint monitors 'zssvd2/loss_after', a metric of compression 2 of 3, .* 'zssvd3/loss_after' of",
    ),
    "stopping": (
        lambda: [*pair(), EarlyStopping("zssvd/held_out_loss")],
        UnsupportedTrainingError,
        "EarlyStopping monitors 'zssvd/held_out_loss', a metric of compression 1 of 2, .* 'zssvd2/held_out_loss'",
    ),
    "dry run": (lambda: pair({"dry_run": True}), UnsupportedTrainingError, "set dry_run only for the last"),
    "8 bits": (lambda: pair({"storage": "remap"}), UnsupportedTrainingError, "in 8 bits, cannot be compressed again"),
    "adapters": (
        lambda: pair({"recovery": LoRARecovery(rank=1, clip_rank=True, merge=False)}),
        UnsupportedTrainingError,
        r"set recovery\.merge to true",
    ),
    "minutes": (
        lambda: pair({"recovery": FactorRecovery(minutes=1)}),
        UnsupportedTrainingError,
        r"recovery\.minutes; leave them out",
    ),
    "patience": (
        lambda: pair({"recovery": FactorRecovery(), "held_out": BATCHES[:1]}),
        UnsupportedTrainingError,
        r"recovery\.patience .* set it to null",
    ),
    "plan": (lambda: pair(None, {"plan": "plan.yaml"}), UnsupportedTrainingError, "2 of the Trainer has a plan"),
    "ratio": (lambda: [compressing(0.4, 1), compressing(0.4, 8)], BudgetError, "reached already; ask for more"),
    "ratio of the model": (
        lambda: [compressing(0.3, 1, budget_of="model"), compressing(0.3, 8)],
        BudgetError,
        r"prune_ratio 0\.3 of the targets \(0\.3 .*compression 1 with 0\.3 of the model .* reached already",
    ),
    "third ratio": (
        lambda: [*pair(), compressing(0.4, 12)],
        BudgetError,
        "compression 3 of the Trainer .* which compression 2 with 0.4 .* reached already",
    ),
    "form": (
        lambda: pair({"storage": "pivoted"}, {"recovery": {"method": "singular_values"}}),
        ConfigError,
        "recovery by 'singular_values'",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_follow_is_refused_before_the_first_batch(kind):
    callbacks, error, match = REFUSED[kind]
    module = dense_module()
    before = state_of(module)
    with pytest.raises(error, match=match):
        fitted(module, *callbacks(), enable_checkpointing=kind == "checkpoints")
    assert_same_state(before, state_of(module))


def test_a_callback_that_is_added_twice_is_refused():
    run = trainer(callback := pair()[0], max_steps=16)
    run.callbacks.append(callback)
    with pytest.raises(UnsupportedTrainingError, match="have the same state_key"):
        run.fit(dense_module(), loader(BATCHES))


def test_another_callback_that_compresses_is_refused():
    class Foreign(L.Callback):
        schedule, phase, report = pair()[0].schedule, Phase.WAIT, None

    with pytest.raises(UnsupportedTrainingError, match=r"another callback that compresses \(Foreign\)"):
        fitted(dense_module(), pair()[0], Foreign())


def test_a_strategy_that_cannot_compress_again_is_refused(monkeypatch):
    monkeypatch.setattr(SingleDeviceAdapter, "compresses_again", False)
    with pytest.raises(UnsupportedTrainingError, match=r"2 ZSSVDCallbacks, and under SingleDeviceStrategy"):
        fitted(dense_module(), *pair())
