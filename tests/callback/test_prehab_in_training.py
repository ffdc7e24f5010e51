"""Low-Rank Prehab in training runs, alone and before a compression."""

import copy
import pickle
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from support.callbacks import Keeps, short
from support.models import (
    CausalLM,
    assert_same_state,
    loader,
    padded_batches,
    state_of,
    tiny_gpt2,
    token_batches,
    trainer,
)
from torch.utils.data import IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from zssvd_lightning import Phase
from zssvd_lightning.errors import (
    CalibrationError,
    CheckpointError,
    NonFiniteError,
    TargetError,
    UnsupportedTrainingError,
)
from zssvd_lightning.prehab import LowRankPrehab
from zssvd_lightning.targets import find_targets

MOMENTS = 4
FLOAT64 = {"precision": "64-true"}


def prehab(**settings) -> LowRankPrehab:
    return LowRankPrehab(**({"steps": 5, "moment_batches": MOMENTS, "weight": 0.3} | settings))


class Own(CausalLM):
    """Notes the losses it returns."""

    def __init__(self, model=None, lr=1e-2):
        torch.manual_seed(0)
        super().__init__(model, lr=lr)
        self.own = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.own.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Diary(L.Callback):
    """Notes the losses that were trained on, the phases they were of, and weights before each batch."""

    def __init__(self):
        self.losses, self.phases, self.weights, self.gradients = [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.weights.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item() * trainer.accumulate_grad_batches)
        self.phases.append([c.phase for c in trainer.callbacks if isinstance(c, Keeps)])


def fit(module, *callbacks, data=None, **settings):
    diary = Diary()
    fitted = trainer(*callbacks, diary, **settings)
    fitted.fit(module, loader(token_batches(12) if data is None else data))
    return diary


def terms(module, diary):
    """What was added to the loss of each batch."""
    return [trained - own for trained, own in zip(diary.losses, module.own, strict=True)]


def second_moments(module, batches):
    """`X^T X / T` of every layer, by hooks of our own, over tokens that are not padding."""
    sums, tokens = {}, {}

    def add(name, X, mask):
        X = X.detach()[mask].double()
        sums[name] = sums.get(name, 0) + X.T @ X
        tokens[name] = tokens.get(name, 0) + len(X)

    for batch in batches:
        mask = batch["attention_mask"].bool()
        handles = [
            target.module.register_forward_pre_hook(lambda _, args, name=name, mask=mask: add(name, args[0], mask))
            for name, target in find_targets(module).items()
        ]
        module.model(**batch)
        for handle in handles:
            handle.remove()
    return {name: total / tokens[name] for name, total in sums.items()}


def exact(regularizer, weights, moments):
    """The mean over layers, by decompositions in float64."""
    values = []
    for name, A in moments.items():
        sigma = torch.linalg.svdvals(weights[f"{name}.weight"].double() @ torch.linalg.cholesky(A))
        values.append(sigma.sum() if regularizer == "nuclear" else sigma.square().sum() / sigma[0].square())
    return float(torch.stack(values).mean())


@pytest.mark.parametrize("regularizer", ["stable_rank", "nuclear"])
def test_the_loss_has_the_term_with_a_growing_weight_after_the_second_moments(regularizer):
    module, data = Own(), padded_batches(12)
    moments_at_start = second_moments(module, data[:MOMENTS])
    diary = fit(module, prehab(regularizer=regularizer, steps=5), data=data, **FLOAT64)
    added = terms(module, diary)
    assert added[:MOMENTS] == [0] * MOMENTS
    plain = Own()
    without = fit(plain, data=data, **FLOAT64)
    for name, weight in diary.weights[MOMENTS].items():
        assert torch.equal(weight, without.weights[MOMENTS][name]), name
    assert any(not torch.equal(w, without.weights[MOMENTS + 1][name]) for name, w in diary.weights[MOMENTS + 1].items())

    still, fixed = Own(lr=0.0), fit(Own(lr=0.0), data=data, **FLOAT64)
    added = terms(still, fit(still, prehab(regularizer=regularizer, steps=5), data=data, **FLOAT64))
    value = exact(regularizer, fixed.weights[0], moments_at_start)
    growing = [0.3 * min(k / 5, 1) * value for k in range(1, 9)]
    assert added[MOMENTS:] == pytest.approx(growing, rel=1e-6 if regularizer == "nuclear" else 1e-2)


def test_an_exponential_schedule_goes_by_the_same_steps():
    module = Own(lr=0.0)
    added = terms(module, fit(module, prehab(schedule="exponential"), **FLOAT64))[MOMENTS:]
    assert [term / added[-1] for term in added] == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1, 1, 1, 1], rel=1e-2)


@pytest.mark.parametrize("regularizer", ["stable_rank", "nuclear"])
def test_training_with_the_term_lowers_the_rank_more_than_without(regularizer):
    found = {}
    for weight in (1e-9, 1.0):
        module, data = Own(), token_batches(30)
        moments = second_moments(module, data[:MOMENTS])
        diary = fit(module, prehab(regularizer=regularizer, weight=weight), data=data)
        found[weight] = exact(regularizer, diary.weights[-1], moments) / exact(regularizer, diary.weights[0], moments)
    assert found[1.0] < 0.9 * found[1e-9]


def test_only_the_layers_that_are_asked_for_are_regularized():
    without = fit(Own(), **FLOAT64)
    diary = fit(Own(), prehab(include="*.layers.0.*", ignore=["q_proj"]), **FLOAT64)
    changed = {
        name
        for name, gradient in diary.gradients[MOMENTS].items()
        if not torch.equal(gradient, without.gradients[MOMENTS][name])
    }
    assert changed == {f"{name}.weight" for name in find_targets(Own(), "*.layers.0.*", ["q_proj"])}


def test_the_term_is_averaged_over_an_accumulation_window_and_begins_with_one():
    """Of two batches a step: 3 batches for second moments take the fourth along."""
    gradients = {}
    for accumulate in (1, 2):
        with_term, without = (
            fit(Own(lr=0.0), *callbacks, accumulate_grad_batches=accumulate, **FLOAT64)
            for callbacks in ([prehab(moment_batches=5 - accumulate, steps=1, regularizer="nuclear")], [])
        )
        differences = [
            {n: g - other[n] for n, g in gradient.items()}
            for gradient, other in zip(with_term.gradients, without.gradients, strict=True)
        ]
        begins = MOMENTS // accumulate
        assert not any(difference.any() for step in differences[:begins] for difference in step.values())
        gradients[accumulate] = differences[-1]
    torch.testing.assert_close(gradients[1], gradients[2], rtol=1e-6, atol=1e-9)
    assert any(gradient.abs().max() > 1e-6 for gradient in gradients[2].values())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_precisions(precision):
    module, data = Own(), token_batches(12)
    moments = second_moments(module, data[:MOMENTS])
    module = Own(lr=0.0)
    diary = fit(module, prehab(steps=1), data=data, precision=precision)
    expected = 0.3 * exact("stable_rank", diary.weights[-1], moments)
    assert terms(module, diary)[-1] == pytest.approx(
        expected, rel=1e-3 if precision.endswith("-true") else 2e-2, abs=0.02
    )
    kind = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    assert {gradient.dtype for gradient in diary.gradients[-1].values()} == {kind}


def compression(**settings):
    return Keeps(prune_ratio=0.3, correction_batches=2, calibration_batches=4, progress=False, **settings)


@pytest.mark.parametrize("first", [True, False])
def test_it_ends_when_a_compression_begins_whichever_callback_is_first(first):
    module, compressing, preparing = Own(), compression(start_step=MOMENTS + 5), prehab()
    callbacks = [preparing, compressing] if first else [compressing, preparing]
    diary = fit(module, *callbacks, data=token_batches(28))
    waited = MOMENTS + 5
    assert diary.phases[waited - 1] == [Phase.WAIT]
    assert diary.phases[waited] == [Phase.CALIBRATE]
    active = [term != 0 for term in terms(module, diary)]
    assert active == [False] * MOMENTS + [True] * 5 + [False] * (28 - waited)
    assert compressing.phase is Phase.DONE

    alone, same = Own(), compression()
    alone.load_state_dict(diary.weights[waited], strict=False)
    fit(alone, same, data=token_batches(28)[waited:])
    assert same.report.losses == compressing.report.losses
    for part in ("input_sums", "gradient_sums"):
        ours, theirs = getattr(compressing.kept, part), getattr(same.kept, part)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert {n: layer.rank for n, layer in same.report.layers.items()} == {
        n: layer.rank for n, layer in compressing.report.layers.items()
    }


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("early", "settings"),
    [
        ({"start_step": 8}, {}),
        ({"start_epoch": 1}, {}),
        ({}, {}),
        ({"start_step": 6}, {"accumulate_grad_batches": 2}),
    ],
)
def test_a_compression_that_would_begin_too_early_is_refused(first, early, settings):
    module = Own().train()
    before = state_of(module)
    callbacks = [prehab(), compression(**early)][:: 1 if first else -1]
    ends = MOMENTS // settings.get("accumulate_grad_batches", 1) + 5
    begins = early.get("start_step", 8 * early.get("start_epoch", 0))
    with pytest.raises(
        UnsupportedTrainingError, match=f"begin at step {begins} .* until step {ends} .*start_step={ends}"
    ):
        fit(module, *callbacks, data=token_batches(8), max_epochs=9, **settings)
    assert_same_state(before, state_of(module))
    assert "training_step" not in module.__dict__


@pytest.mark.parametrize(
    ("late", "settings"),
    [({"start_step": 9}, {}), ({"start_epoch": 2}, {}), ({"start_step": 7}, {"accumulate_grad_batches": 2})],
)
def test_a_compression_may_begin_as_soon_as_prehab_has_had_its_steps(late, settings):
    module = Own()
    diary = fit(module, prehab(), compression(**late), data=token_batches(8), max_epochs=9, **settings)
    assert Phase.RECOVER in diary.phases[-1]
    growth = [term for term in terms(module, diary) if term != 0]
    assert len(growth) >= 5 * settings.get("accumulate_grad_batches", 1)


class Endless(IterableDataset):
    def __iter__(self):
        return iter(token_batches(6))


def test_epochs_of_unknown_length_are_warned_about_when_they_were_too_short(caplog):
    callbacks = prehab(steps=50), compression(start_epoch=1, corrections=0)
    trainer(*callbacks, max_epochs=3).fit(Own(), torch.utils.data.DataLoader(Endless(), batch_size=None))
    assert "compression has begun before the weight of LowRankPrehab has grown to 0.3" in caplog.text


class Saves(L.Callback):
    """Saves a checkpoint the n-th time a hook runs, and ends the run there."""

    def __init__(self, path: Path, hook: str, at: int) -> None:
        self.path, self.left = path, at
        setattr(self, hook, self._hook)

    def _hook(self, trainer, *_, **__):
        self.left -= 1
        if self.left == 0:
            trainer.save_checkpoint(self.path)
            raise ConnectionError


def run(*callbacks, ckpt_path=None, count=14, data=None, **settings):
    module, diary = Own(), Diary()
    data = StatefulDataLoader(token_batches(count), batch_size=None) if data is None else data
    fitted = trainer(*callbacks, diary, **settings)
    fitted.fit(module, data, ckpt_path=ckpt_path)
    return module, diary


@pytest.mark.parametrize(
    ("at", "regularizer"),
    [(2, "stable_rank"), (MOMENTS, "nuclear"), (MOMENTS + 1, "stable_rank"), (MOMENTS + 3, "stable_rank")],
)
def test_a_run_that_was_cut_off_ends_like_one_that_was_not_to_the_last_bit(tmp_path, at, regularizer):
    whole, expected = run(prehab(regularizer=regularizer))
    for first in (True, False):  # others may save before or after this callback is told that the batch is over
        preparing, saving = prehab(regularizer=regularizer), Saves(tmp_path / "c.ckpt", "on_train_batch_end", at)
        with pytest.raises(ConnectionError):
            run(*([preparing, saving] if first else [saving, preparing]))
        torch.load(tmp_path / "c.ckpt", weights_only=True)
        resumed, diary = run(prehab(regularizer=regularizer), ckpt_path=tmp_path / "c.ckpt")
        assert diary.losses == expected.losses[at:]
        assert all(torch.equal(w, resumed.state_dict()[n]) for n, w in whole.state_dict().items())


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_zero_grad"])
@pytest.mark.parametrize("at", [2, MOMENTS + 1, MOMENTS + 3])
def test_a_batch_that_is_run_again_counts_once(tmp_path, hook, at):
    """Lightning resumes in the middle of a batch with that batch, but with other data unless all are alike."""
    settings = {"max_steps": 12, "data": loader(token_batches(1) * 12)}
    whole, expected = run(prehab(), **settings)
    with pytest.raises(ConnectionError):
        run(prehab(), Saves(tmp_path / "c.ckpt", hook, at), **settings)
    resumed, diary = run(prehab(), ckpt_path=tmp_path / "c.ckpt", **settings)
    assert diary.losses == expected.losses[at - 1 :]
    assert all(torch.equal(w, resumed.state_dict()[n]) for n, w in whole.state_dict().items())


def test_a_run_with_windows_and_epochs_goes_on_too(tmp_path):
    settings = {"accumulate_grad_batches": 2, "max_epochs": 3}
    whole, expected = run(prehab(), count=5, **settings)
    for at in (4, 7):  # behind a step each: Lightning loses the gradients of an open window
        path = tmp_path / f"{at}.ckpt"
        hook = "on_train_batch_end"
        with pytest.raises(ConnectionError):
            run(prehab(), Saves(path, hook, at), count=5, **settings)
        resumed, diary = run(prehab(), count=5, ckpt_path=path, **settings)
        assert diary.losses == expected.losses[-len(diary.losses) :]
        assert all(torch.equal(w, resumed.state_dict()[n]) for n, w in whole.state_dict().items()), at


def test_a_checkpoint_of_the_compression_after_it_goes_on_without_it(tmp_path):
    def callbacks():
        return prehab(), short(start_step=MOMENTS + 5, calibration_batches=3)

    whole, expected = run(*callbacks(), count=30)
    for at in (MOMENTS + 6, MOMENTS + 20):
        with pytest.raises(ConnectionError):
            run(*callbacks(), Saves(tmp_path / "c.ckpt", "on_train_batch_end", at), count=30)
        resumed, diary = run(*callbacks(), count=30, ckpt_path=tmp_path / "c.ckpt")
        assert diary.losses == expected.losses[-len(diary.losses) :]
        assert all(torch.equal(w, resumed.state_dict()[n]) for n, w in whole.state_dict().items())
    assert torch.load(tmp_path / "c.ckpt")["callbacks"]["LowRankPrehab"]["whitening"] == {}


@pytest.mark.parametrize(("setting", "value"), [("steps", 6), ("weight", 0.2), ("include", ["q_proj"])])
def test_a_checkpoint_of_other_settings_is_refused(tmp_path, setting, value):
    with pytest.raises(ConnectionError):
        run(prehab(), Saves(tmp_path / "c.ckpt", "on_train_batch_end", 6))
    module = Own()
    with pytest.raises(
        CheckpointError, match=rf"other settings \({setting} was .* and is {value!r}".replace("[", r"\[")
    ):
        trainer(prehab(**{setting: value})).fit(module, loader(token_batches()), ckpt_path=tmp_path / "c.ckpt")
    assert "training_step" not in module.__dict__


def test_a_checkpoint_of_a_later_version_is_refused():
    callback = prehab()
    with pytest.raises(CheckpointError, match="version 2, this release reads 1"):
        callback.load_state_dict(callback.state_dict() | {"version": 2})


def test_a_checkpoint_from_before_the_callback_was_there_starts_prehab(tmp_path):
    with pytest.raises(ConnectionError):
        run(Saves(tmp_path / "c.ckpt", "on_train_batch_end", 3))
    module, diary = run(prehab(), ckpt_path=tmp_path / "c.ckpt")
    assert [term != 0 for term in terms(module, diary)] == [False] * MOMENTS + [True] * (11 - MOMENTS)


def test_validation_of_a_checkpoint_takes_up_nothing_and_a_second_fit_starts_afresh(tmp_path):
    saving = ModelCheckpoint(tmp_path, save_last=True)
    module, callback, data = Own(), prehab(), loader(token_batches(12))
    trainer(callback, saving, enable_checkpointing=True).fit(module, data)
    other = prehab(steps=9)
    trainer(other).validate(Own(), data, ckpt_path=tmp_path / "last.ckpt")
    assert other.state_dict()["whitening"] == {}
    module.own.clear()
    diary = fit(module, callback)
    assert [term != 0 for term in terms(module, diary)] == [False] * MOMENTS + [True] * (12 - MOMENTS)


@pytest.mark.parametrize("regularizer", ["stable_rank", "nuclear"])
def test_loggers_are_told_as_often_as_by_lightning(tmp_path, regularizer):
    class Logs(Own):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("train_loss", loss)
            return loss

    module, logger = Logs(lr=0.0), CSVLogger(tmp_path)
    diary = fit(module, prehab(regularizer=regularizer), logger=logger, log_every_n_steps=3)
    rows = [line.split(",") for line in Path(logger.log_dir, "metrics.csv").read_text().splitlines()]
    metrics = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    name = "zssvd/nuclear_norm" if regularizer == "nuclear" else "zssvd/stable_rank"
    told = {int(m["step"]): (float(m["zssvd/prehab_weight"]), float(m[name])) for m in metrics if m[name]}
    losses = {int(m["step"]): float(m["train_loss"]) for m in metrics if m["train_loss"]}
    assert told.keys() == {5, 8, 11}
    assert [told[step][0] for step in told] == pytest.approx([0.12, 0.3, 0.3])
    added = terms(module, diary)
    assert [w * value for w, value in told.values()] == pytest.approx([added[5], added[8], added[11]], rel=1e-3)
    assert losses == pytest.approx({step: module.own[step] for step in (2, 5, 8, 11)})


class Fails(L.Callback):
    def __init__(self, hook, at):
        self.left = at
        setattr(self, hook, self._hook)

    def _hook(self, *_, **__):
        self.left -= 1
        if self.left == 0:
            raise ConnectionError


@pytest.mark.parametrize("own_step", [True, False])
@pytest.mark.parametrize(
    ("hook", "at"),
    [("on_train_start", 1), ("on_train_batch_start", 2), ("on_before_backward", 2), ("on_train_batch_end", 6)],
)
def test_a_failed_run_leaves_the_module_as_it_was(hook, at, own_step):
    module = Own(lr=0.0).train()
    if own_step:
        module.training_step = module.training_step
    step, before = module.__dict__.get("training_step"), state_of(module)
    for callbacks in ([prehab(), Fails(hook, at)], [Fails(hook, at), prehab()]):
        with pytest.raises(ConnectionError):
            fit(module, *callbacks)
        module.zero_grad()
        assert_same_state(before, state_of(module))
        assert module.__dict__.get("training_step") is step


class Manual(Own):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Frozen(Own):
    def __init__(self):
        super().__init__()
        for target in find_targets(self).values():
            target.module.weight.requires_grad = False


class NeverRuns(Own):
    def __init__(self):
        super().__init__()
        self.spare = torch.nn.Linear(32, 32)


class Diverges(Own):
    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == MOMENTS + 2:
            self.model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan


CASES = {
    "manual": (Manual, {}, UnsupportedTrainingError, "Manual optimizes manually"),
    "frozen": (Frozen, {}, UnsupportedTrainingError, "all 14 layers to regularize are frozen"),
    "target": (Own, {"include": "nothing"}, TargetError, "matches no module"),
    "never runs": (NeverRuns, {}, CalibrationError, "spare never ran"),
    "nan": (Diverges, {}, NonFiniteError, r"stable_rank of model.model.layers.1.mlp.up_proj \(48, 32\) is nan"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_done_is_a_named_error(case):
    build, settings, error, message = CASES[case]
    module = build().train()
    hooks = state_of(module)["hooks"]
    with pytest.raises(error, match=message):
        fit(module, prehab(**settings))
    assert state_of(module)["hooks"] == hooks
    assert "training_step" not in module.__dict__


def test_frozen_layers_beside_trained_ones_stay_as_they_are():
    module = Own(tiny_gpt2())
    frozen = module.model.transformer.h[0].mlp.c_fc.weight
    frozen.requires_grad = False
    before = frozen.detach().clone()
    trainer(prehab()).fit(module, loader(token_batches(12)))
    assert torch.equal(frozen, before)


class Counts(LowRankPrehab):
    """Keeps how many tokens each second moment is of."""

    tokens = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        moments = self._run.gathering.moments if self._run.gathering else None
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if moments is not None and self._run.gathering is None:
            self.tokens = dict(moments.tokens)


class Skips(Own):
    """Gives no loss for the second batch, and leaves out the rest of the first epoch."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx == 1 and self.current_epoch == 0 else loss

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if self.current_epoch == 0 and batch_idx == 3 else None


def test_activation_checkpointing_compiled_code_and_skipped_batches_count_once():
    checkpointed, compiled = Own(), Own()
    checkpointed.model.gradient_checkpointing_enable()
    torch.compiler.reset()
    compiled.model.model.layers[0].mlp.compile(backend="eager")
    compiled.train().model(**token_batches(1)[0]).loss.backward()  # compiles it, without the hooks to come
    for module in (Own(), checkpointed, compiled, Skips()):
        counting = Counts(5, moment_batches=MOMENTS)
        trainer(counting, max_epochs=2).fit(module, loader(token_batches(8)))
        assert set(counting.tokens.values()) == {MOMENTS * 4 * 24}
        assert len(counting.tokens) == 8
        assert not any(m._forward_pre_hooks for m in module.modules())


def test_copies_take_nothing_of_a_run_along():
    module, callback = Own(), prehab(include=("q_proj",))
    trainer(callback).fit(module, loader(token_batches(12)))
    for other in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert other.state_dict()["settings"] == callback.state_dict()["settings"]
        diary = fit(twin := Own(), other)
        assert any(term != 0 for term in terms(twin, diary))


class Module(Own):
    def __init__(self) -> None:
        super().__init__()

    def train_dataloader(self):
        return loader(token_batches(12))


def test_lightning_cli_builds_it_from_yaml(tmp_path):
    settings = {"steps": 3, "weight": 2, "regularizer": "nuclear", "ignore": ["q_proj"], "include": None}
    callback = {"class_path": "zssvd_lightning.prehab.LowRankPrehab", "init_args": settings}
    limits = {"accelerator": "cpu", "max_steps": 1, "logger": False, "enable_checkpointing": False}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"trainer": limits | {"callbacks": [callback]}}))
    ran = LightningCLI(Module, args=["fit", "--config", str(file)], save_config_callback=None)
    (built,) = [c for c in ran.trainer.callbacks if isinstance(c, LowRankPrehab)]
    assert (built.steps, built.weight, built.regularizer, built.ignore) == (3, 2.0, "nuclear", ["q_proj"])
