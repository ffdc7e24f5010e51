"""What an ordinary run may also do."""

import copy
import pickle

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
)
from lightning.pytorch.plugins.precision import MixedPrecision
from support.callbacks import Interrupt, Keeps, short
from support.models import (
    CausalLM,
    assert_same_state,
    loader,
    padded_batches,
    state_of,
    tiny_llama,
    token_batches,
    trainer,
)
from torch.utils.data import DataLoader, IterableDataset

from zssvd_lightning import LowRankCheckpointMixin, LowRankLinear, Phase, scheduled_steps
from zssvd_lightning.errors import CheckpointError, UnfinishedError, UnsupportedTrainingError
from zssvd_lightning.serialization.specs import ranks_of


class Steps(L.Callback):
    """Notes the phase and the learning rate of every training step."""

    def __init__(self, callback):
        self.callback, self.phases, self.rates = callback, [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.phases.append(self.callback.phase)
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(token_batches())


class Scaled(MixedPrecision):
    def __init__(self, scale=1024.0):
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))


def compress(callback, module=None, batches=None, **settings):
    module = module or CausalLM()
    fitted = trainer(callback, **({"max_epochs": 4} | settings))
    fitted.fit(module, loader(batches or token_batches()))
    return module, fitted


# The same callback again


def test_a_callback_interrupted_in_recovery_compresses_the_next_module():
    callback = short(corrections=0)
    with pytest.raises(ConnectionError):
        trainer(callback, Interrupt(6), max_epochs=2).fit(CausalLM(), loader(token_batches()))
    assert callback.phase is Phase.RECOVER
    module, _ = compress(callback)
    assert ranks_of(module)


def test_a_module_that_was_made_dense_again_is_compressed_again(tmp_path):
    callback = short(corrections=0)
    module = CausalLM()
    trainer().fit(module, loader(token_batches()))
    fitted = trainer(callback, max_epochs=2)
    fitted.strategy.connect(module)
    fitted.save_checkpoint(tmp_path / "dense.ckpt")
    compress(callback, module)
    trainer(callback).validate(module, loader(token_batches()), ckpt_path=str(tmp_path / "dense.ckpt"), verbose=False)
    assert not ranks_of(module)
    compress(callback, module)
    assert ranks_of(module)


def test_a_finished_checkpoint_is_gone_on_from_by_a_callback_that_has_another_behind_it(tmp_path):
    callback = short(corrections=0)
    module, fitted = compress(callback)
    fitted.save_checkpoint(tmp_path / "done.ckpt")
    callback.report.first_order_sum = 123.0
    again = CausalLM()
    fit = trainer(callback, max_epochs=6)
    fit.fit(again, loader(token_batches()), ckpt_path=str(tmp_path / "done.ckpt"))
    assert ranks_of(again) == ranks_of(module)
    assert callback.report.first_order_sum != 123.0


# Gradients that take other ways


class WithOptimizer(CausalLM):
    def __init__(self, model, make):
        super().__init__(model)
        self.make = make

    def configure_optimizers(self):
        return self.make(self)


OPTIMIZERS = {
    "fused": lambda module: torch.optim.AdamW(module.parameters(), lr=0.0, fused=True),
    "plain": lambda module: torch.optim.AdamW(module.parameters(), lr=0.0),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_loss_scale_is_taken_off_whatever_the_optimizer(name):
    model = tiny_llama()
    kept = []
    for plugins in ([], [Scaled()]):
        callback = Keeps(0.3, "zs-svd-line-search", corrections=0, progress=False)
        compress(callback, WithOptimizer(copy.deepcopy(model), OPTIMIZERS[name]), padded_batches(), plugins=plugins)
        kept.append(callback.kept)
    for layer in kept[0].gradient_sums:
        G, H = kept[0].mean_gradient(layer), kept[1].mean_gradient(layer)
        assert (G - H).norm() < 0.02 * G.norm()


def test_frozen_targets_go_with_a_loss_scale():
    module = CausalLM()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("proj" not in name)
    module.configure_optimizers = lambda: torch.optim.AdamW([p for p in module.parameters() if p.requires_grad])
    compress(short(corrections=0), module, plugins=[Scaled()])
    assert ranks_of(module)


def test_an_overflow_counts_nothing_and_lowers_the_scale():
    callback, plugin = Keeps(0.3, "zs-svd-line-search", corrections=0, progress=False), Scaled(2.0**31)
    compress(callback, plugins=[plugin], max_epochs=12)
    assert callback.kept.batches == 4
    assert set(callback.kept.tokens.values()) == {4 * 4 * 24}
    assert plugin.scaler.get_scale() < 2.0**31
    assert "step" not in plugin.scaler.__dict__


class StepsEverySecondBatch(CausalLM):
    """As Lightning's documentation shows it."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        if batch_idx % 2 == 1:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


@pytest.mark.parametrize("plugins", [[], [Scaled()]], ids=["float32", "loss scale"])
def test_steps_that_a_module_leaves_out_lose_no_gradients(plugins):
    model = tiny_llama()
    plain, other = (Keeps(0.3, "zs-svd-line-search", corrections=0, progress=False) for _ in range(2))
    compress(plain, CausalLM(copy.deepcopy(model)), padded_batches())
    compress(other, StepsEverySecondBatch(copy.deepcopy(model)), padded_batches(), plugins=plugins)
    assert plain.kept.loss_terms == other.kept.loss_terms
    for name in plain.kept.gradient_sums:
        G, H = plain.kept.mean_gradient(name), other.kept.mean_gradient(name)
        assert (G - H).norm() < (0.02 if plugins else 1e-5) * G.norm()


# Schedules and limits


class Annealed(CausalLM):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        steps = scheduled_steps(self.trainer)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1e-4 * (1 - step / steps))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def test_a_schedule_lasts_as_long_as_recovery_also_when_resumed(tmp_path):
    rates = []
    for resume in (None, str(tmp_path / "step=9.ckpt")):
        callback = short(corrections=0)
        steps, saving = Steps(callback), ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        fitted = trainer(callback, steps, saving, max_epochs=4, enable_checkpointing=True)
        fitted.fit(Annealed(), loader(token_batches(4)), ckpt_path=resume)
        rates.append(steps.rates)
    whole, resumed = rates
    assert whole[:4] == pytest.approx([1e-4 * (1 - step / 16) for step in range(4)])
    assert whole[4:] == pytest.approx([1e-4 * (1 - step / 12) for step in range(12)])
    assert resumed[-6:] == pytest.approx(whole[-6:])


def test_a_schedule_of_a_second_fit_lasts_for_all_of_it():
    callback, module = short(corrections=0), Annealed()
    trainer(callback, max_epochs=2).fit(module, loader(token_batches()))
    for again in (module, Annealed()):
        steps = Steps(callback)
        trainer(callback, steps, max_epochs=2).fit(again, loader(token_batches()))
        assert steps.rates[:4] == pytest.approx([1e-4 * (1 - step / 8) for step in range(4)])


def test_a_scheduled_accumulation_is_not_refused_where_a_fixed_one_is_not():
    callback = short(corrections=0)
    data = loader(token_batches(8))
    fitted = trainer(callback, GradientAccumulationScheduler({0: 4}), max_steps=3, max_epochs=-1)
    fitted.fit(CausalLM(), data)
    assert callback.phase is Phase.DONE


def test_an_extension_is_that_of_one_fit():
    callback = short(extend_training=True)
    lengths = []
    for _ in range(2):
        steps = Steps(callback)
        trainer(callback, steps, max_steps=6, max_epochs=-1).fit(CausalLM(), loader(token_batches()))
        lengths.append(len(steps.phases))
    with pytest.raises(ConnectionError):
        trainer(callback, Interrupt(7), max_steps=6, max_epochs=-1).fit(CausalLM(), loader(token_batches()))
    steps = Steps(callback)
    trainer(callback, steps, max_steps=6, max_epochs=-1).fit(CausalLM(), loader(token_batches()))
    assert [*lengths, len(steps.phases)] == [18, 18, 18]


def test_an_extension_of_a_stream_is_granted_when_its_length_is_known():
    callback = short(extend_training=True)
    steps = Steps(callback)
    fitted = trainer(callback, steps, max_epochs=1)
    fitted.fit(CausalLM(), DataLoader(Stream(), batch_size=None))
    assert callback.phase is Phase.DONE
    assert [phase for phase in steps.phases if phase is Phase.RECOVER]
    assert fitted.max_epochs == 1


class Saves(L.Callback):
    """Saves at every batch's end; stands before the compression."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


@pytest.mark.parametrize("step", [2, 4, 6, 11])
def test_a_checkpoint_of_a_callback_that_stands_before_counts_every_batch_once(tmp_path, step):
    callback = short(extend_training=True, calibration_batches=4)
    torch.manual_seed(0)
    fitted = trainer(Saves(tmp_path), callback, max_steps=6, max_epochs=-1)
    module = CausalLM()
    fitted.fit(module, loader(token_batches(20)))
    assert fitted.global_step == 18
    resumed, again = short(extend_training=True, calibration_batches=4), CausalLM()
    fit = trainer(resumed, max_steps=6, max_epochs=-1)
    fit.fit(again, loader(token_batches(20)), ckpt_path=str(tmp_path / f"{step}.ckpt"))
    assert fit.global_step == 18
    assert resumed.phase is Phase.DONE
    assert len(resumed.report.losses) == len(callback.report.losses)


# Scores


class Scores(CausalLM):
    """Dense 1, compressed 7."""

    def validation_step(self, batch, batch_idx):
        compressed = any(isinstance(m, LowRankLinear) for m in self.modules())
        self.log("val_loss", 7.0 if compressed else 1.0)


def test_a_checkpoint_between_validations_does_not_carry_the_dense_score(tmp_path):
    saving = ModelCheckpoint(tmp_path, "{step}", monitor="val_loss", every_n_train_steps=1)
    callback = short(corrections=0, start_step=5)
    data = loader(token_batches())
    fitted = trainer(callback, saving, max_epochs=5, enable_checkpointing=True)
    fitted.fit(Scores(), data, data)
    assert saving.best_model_score == 7.0


def test_early_stopping_between_validations_does_not_take_the_dense_score():
    stopping = EarlyStopping("val_loss", patience=2, check_on_train_epoch_end=True, strict=False)
    callback = short(corrections=0, start_epoch=2)
    data = loader(token_batches())
    fitted = trainer(callback, stopping, max_epochs=6, check_val_every_n_epoch=2)
    fitted.fit(Scores(), data, data)
    assert stopping.best_score == 7.0


# Dry runs


@pytest.mark.parametrize("least", [{"min_epochs": 3}, {"min_steps": 9}])
def test_a_dry_run_stops_at_once_and_leaves_limits_as_they_were(tmp_path, least):
    callback, module = short(dry_run=tmp_path / "plan.yaml"), CausalLM()
    before = state_of(module)
    _, fitted = compress(callback, module, **least)
    assert_same_state(before, state_of(module))
    assert fitted.global_step == 4
    assert all(getattr(fitted, name) == value for name, value in least.items())


def test_a_checkpoint_of_a_dry_run_is_gone_on_from_with_the_plan(tmp_path):
    plan = tmp_path / "plan.yaml"
    _, fitted = compress(short(dry_run=plan))
    fitted.save_checkpoint(tmp_path / "dry.ckpt")
    module, callback = CausalLM(), short(plan=plan, corrections=0)
    trainer(callback, max_epochs=4).fit(module, loader(token_batches()), ckpt_path=str(tmp_path / "dry.ckpt"))
    assert ranks_of(module)


def test_a_dry_run_from_a_truncated_model_is_refused(tmp_path):
    with pytest.raises(ConnectionError):
        trainer(Saves(tmp_path), short(), Interrupt(6), max_epochs=4).fit(CausalLM(), loader(token_batches()))
    dry = trainer(short(dry_run=tmp_path / "plan.yaml"), max_epochs=4)
    with pytest.raises(CheckpointError, match="dry run starts from a dense model"):
        dry.fit(CausalLM(), loader(token_batches()), ckpt_path=str(tmp_path / "6.ckpt"))


# Checkpoints at unusual moments


def test_a_checkpoint_saved_after_the_fit_says_what_it_takes(tmp_path):
    _, fitted = compress(short(corrections=0))
    fitted.save_checkpoint(tmp_path / "after.ckpt")
    with pytest.raises(RuntimeError, match="LowRankCheckpointMixin"):
        CausalLM.load_from_checkpoint(tmp_path / "after.ckpt")


class SavesIn(L.Callback):
    def __init__(self, folder, hook):
        self.folder = folder
        setattr(self, hook, self.save)

    def save(self, trainer, *_):
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


@pytest.mark.parametrize("hook", ["on_after_backward", "on_before_optimizer_step"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_batch_that_will_run_again_is_not_counted_twice(tmp_path, hook, accumulate):
    batch = token_batches(1) * 9
    settings = {"accumulate_grad_batches": accumulate, "max_epochs": 2}
    plain = Keeps(0.3, "zs-svd-line-search", corrections=0, progress=False)
    torch.manual_seed(0)
    module = CausalLM()
    fitted = trainer(plain, SavesIn(tmp_path, hook), **settings)
    fitted.fit(copy.deepcopy(module), loader(batch))
    resumed = Keeps(0.3, "zs-svd-line-search", corrections=0, schedule={"calibration_epochs": 1}, progress=False)
    fit = trainer(resumed, **(settings | {"max_epochs": 3}))
    fit.fit(module, loader(batch), ckpt_path=str(tmp_path / "1.ckpt"))
    for name in plain.kept.gradient_sums:
        G, H = plain.kept.mean_gradient(name), resumed.kept.mean_gradient(name)
        assert (G - H).norm() < 1e-5 * G.norm()


def test_a_checkpoint_from_between_truncation_and_factorization_starts_over(tmp_path):
    class Logs(L.pytorch.loggers.CSVLogger):
        def log_metrics(self, metrics, step=None):
            if "zssvd/first_order_sum" in metrics:
                fitted.save_checkpoint(tmp_path / "between.ckpt")

    torch.manual_seed(0)
    module = CausalLM()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    fitted = trainer(short(corrections=0), max_epochs=2, logger=Logs(tmp_path))
    fitted.fit(module, loader(token_batches()))
    first, callback, again = First(), short(corrections=0), CausalLM()
    fit = trainer(callback, first, max_epochs=4)
    fit.fit(again, loader(token_batches()), ckpt_path=str(tmp_path / "between.ckpt"))
    assert all(torch.equal(first.seen[n], before[n]) for n in before)
    assert callback.phase is Phase.DONE


class First(L.Callback):
    seen = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen = self.seen or {n: p.detach().clone() for n, p in pl_module.named_parameters()}


class FailsAtStart(L.Callback):
    def on_train_start(self, trainer, pl_module):
        raise ConnectionError


@pytest.mark.parametrize("first", [True, False])
def test_a_resumed_run_that_fails_at_its_start_has_the_original_weights(tmp_path, first):
    torch.manual_seed(0)
    module = CausalLM()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    with pytest.raises(ConnectionError):
        trainer(Saves(tmp_path), short(), Interrupt(6), max_epochs=4).fit(module, loader(token_batches()))
    again, callback = CausalLM(), short()
    callbacks = [FailsAtStart(), callback] if first else [callback, FailsAtStart()]
    with pytest.raises(ConnectionError):
        trainer(*callbacks, max_epochs=4).fit(again, loader(token_batches()), ckpt_path=str(tmp_path / "6.ckpt"))
    assert all(torch.equal(p, before[n]) for n, p in again.named_parameters())
    compress(callback, again)
    assert ranks_of(again)


def test_a_resumed_run_with_no_batch_left_is_unfinished_and_put_back(tmp_path):
    torch.manual_seed(0)
    module = CausalLM()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    with pytest.raises(ConnectionError):
        trainer(Saves(tmp_path), short(), Interrupt(6), max_epochs=4).fit(module, loader(token_batches()))
    again = CausalLM()
    with pytest.raises(UnfinishedError, match="phase 'correct'"):
        trainer(short(), max_steps=6).fit(again, loader(token_batches()), ckpt_path=str(tmp_path / "6.ckpt"))
    assert all(torch.equal(p, before[n]) for n, p in again.named_parameters())


# Neighbors


class Copies(L.Callback):
    """Copies the module in every way, as callbacks do that keep the best one."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.copies = [copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))]


class Plain(CausalLM):
    def on_load_checkpoint(self, checkpoint):
        self.loaded = True


def test_a_module_can_be_copied_in_the_middle_of_a_fit(tmp_path):
    copies = Copies()
    module = Plain()
    fitted = trainer(short(corrections=0), copies, max_epochs=2)
    fitted.fit(module, loader(token_batches()))
    fitted.save_checkpoint(tmp_path / "c.ckpt")
    for other in copies.copies:
        assert ranks_of(other) == ranks_of(module)
        other.on_load_checkpoint(torch.load(tmp_path / "c.ckpt"))
        assert other.loaded
    assert not hasattr(module, "loaded")


def test_hooks_on_replaced_layers_go_on_and_can_be_removed():
    module, seen = CausalLM(), []
    layer = module.model.model.layers[0].mlp.up_proj
    forward = layer.register_forward_hook(lambda *_: seen.append("after"))
    before = layer.register_forward_pre_hook(lambda *_, **__: seen.append("before"), with_kwargs=True)
    compress(short(corrections=0, prune_ratio=0.6), module)
    new = module.model.model.layers[0].mlp.up_proj
    assert isinstance(new, LowRankLinear)
    seen.clear()
    new(torch.randn(2, 32))
    assert seen == ["before", "after"]
    forward.remove()
    before.remove()
    new(torch.randn(2, 32))
    assert seen == ["before", "after"]


def test_thawing_layer_by_layer_is_refused_by_name():
    with pytest.raises(UnsupportedTrainingError, match="BackboneFinetuning keeps optimizer groups by the names"):
        trainer(BackboneFinetuning(), short(), max_epochs=4).fit(Backboned(), loader(token_batches()))


class Backboned(LowRankCheckpointMixin, CausalLM):
    def __init__(self):
        super().__init__()
        self.backbone = self.model.model

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad] or [self.model.lm_head.weight], lr=0.1)
