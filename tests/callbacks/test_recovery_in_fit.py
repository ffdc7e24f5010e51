"""Recovery inside a fit: its own optimizer and loss, of its own parameters, and a plain low-rank model at the end."""

import copy
import math

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from support.callbacks import short
from support.models import CausalLM, loader, logits, sequence_pairs, tiny_t5, token_batches, trainer
from torch import nn

from zssvd_lightning import LowRankCheckpointMixin, LowRankLinear, Phase, ZSSVDCallback
from zssvd_lightning.errors import CheckpointError, ConfigError, DivergedError, RecoveryError, TargetError, TeacherError
from zssvd_lightning.layers.base import CompressedLinear
from zssvd_lightning.layers.pivoted import PivotedLinear, PivotForm
from zssvd_lightning.layers.pivoted_columns import ColumnPivotedLinear
from zssvd_lightning.layers.registry import Factored
from zssvd_lightning.model.adapters import merge_adapters, on
from zssvd_lightning.recovery.divergence import divergence
from zssvd_lightning.recovery.methods import FactorRecovery, LoRARecovery, SingularValueRecovery
from zssvd_lightning.recovery.teachers import save_predictions

LORA = {"rank": 2, "clip_rank": True}
NEEDED = 4
"""Batches until the model is low-rank."""


class LM(LowRankCheckpointMixin, CausalLM):
    def __init__(self, **settings):
        torch.manual_seed(0)
        super().__init__(**settings)


class Diary(L.Callback):
    """What is seen of every batch of the recovery."""

    def __init__(self):
        self.losses, self.rates, self.trained, self.weights, self.first = [], [], [], [], None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if compression(trainer).phase is Phase.RECOVER:
            self.first = self.first or copy.deepcopy(pl_module.model)
            self.trained.append({n for n, p in pl_module.named_parameters() if p.requires_grad})
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if compression(trainer).phase is Phase.RECOVER and self.trained and outputs:
            self.losses.append(float(outputs["loss"]))
            self.weights.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})


def compression(trainer):
    return next(callback for callback in trainer.callbacks if isinstance(callback, ZSSVDCallback))


def fit(recovery, *callbacks, module=None, batches=None, ckpt_path=None, compress=None, **settings):
    module, diary = module or LM(), Diary()
    settled = {"corrections": 0, "calibration_batches": NEEDED, "recovery": recovery} | (compress or {})
    callback = short(**settled)
    fitted = trainer(callback, diary, *callbacks, **({"max_steps": 14} | settings))
    fitted.fit(module, loader(batches or token_batches(14)), ckpt_path=ckpt_path)
    return module, callback, diary, fitted


def is_plain(module):
    thin = [part for m in module.modules() if isinstance(m, Factored) for part in m.thin_layers().values()]
    return bool(thin) and all(type(part) is nn.Linear for part in thin)


def compressed(module):
    return [m for m in module.modules() if isinstance(m, CompressedLinear)]


WAYS = {
    "lora": LoRARecovery(**LORA, lr=1e-2),
    "lora on pivots": LoRARecovery(**LORA, lr=1e-2),
    "lora in two steps on pivots": LoRARecovery(**LORA, two_step=True, peft={"use_dora": True}),
    "lora in two steps": LoRARecovery(**LORA, two_step=True, peft={"use_dora": True}),
    "pissa": LoRARecovery(**LORA, peft={"init_lora_weights": "pissa"}),
    "factors": FactorRecovery(two_step=True),
    "singular values": SingularValueRecovery(lr=1e-1),
}


@pytest.mark.parametrize("way", WAYS)
def test_only_what_it_says_is_trained_and_a_plain_model_of_the_same_ranks_is_left(way):
    recovery = WAYS[way]
    module = LM()
    module.model.model.norm.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in module.named_parameters() if ".layers." not in name}
    storage = {"storage": "pivoted" if "pivots" in way else "factors"}
    module, callback, diary, fitted = fit(recovery, module=module, compress=storage)
    assert callback.phase is Phase.DONE
    assert is_plain(module)
    form = PivotForm if "pivots" in way else LowRankLinear
    report = callback.report
    ranks = {name: layer.rank for name, layer in report.layers.items() if layer.rank}
    assert {n: m.rank for n, m in module.named_modules() if isinstance(m, form)} == ranks
    assert len(compressed(module)) == len(ranks)
    kept = sum(sum(p.numel() for p in module.get_submodule(name).parameters()) for name in report.layers)
    assert kept / sum(math.prod(layer.shape) for layer in report.layers.values()) == pytest.approx(1 - report.reached)
    assert {n: p.requires_grad for n, p in module.named_parameters() if ".layers." not in n} == flags
    assert all(p.requires_grad for n, p in module.named_parameters() if ".layers." in n)
    assert not {"training_step", "configure_optimizers", "on_load_checkpoint"} & module.__dict__.keys()
    assert "on_exception" not in fitted.strategy.__dict__

    halves = [diary.trained[0], diary.trained[-1]]
    for parts, trained in zip([recovery.stages[0], recovery.stages[-1]], halves, strict=True):
        assert trained
        assert all(recovery.trains(name.partition("_proj.")[2], parts) for name in trained)
    assert (halves[0] == halves[1]) == (len(recovery.stages) == 1)
    first, last = diary.weights[0], diary.weights[-1]
    still = (first.keys() & last.keys()) - halves[0] - halves[1]
    assert {n for n in still if "base_layer" not in n}
    assert all(torch.equal(first[n], last[n]) for n in still if "base_layer" not in n or len(recovery.stages) == 1)
    assert any(not torch.equal(diary.weights[-3][name], last[name]) for name in halves[1])


@pytest.mark.parametrize("two_step", [False, True])
def test_pivot_rows_and_coefficients_are_trained_in_the_place_of_factors(tmp_path, two_step):
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=1, filename="{step}")
    settings = {"compress": {"storage": "pivoted"}, "batches": token_batches(1) * 14}
    recovery = FactorRecovery(two_step=two_step, lr=1e-2, loss="both", teacher_dtype="float32")
    module, _, diary, _ = fit(recovery, saving, enable_checkpointing=True, **settings)
    assert {type(layer) for layer in compressed(module)} == {PivotedLinear, ColumnPivotedLinear}
    ends = ("pivots.weight", "mixing.weight"), ("others.weight", "columns.weight")
    names = {n for n, _ in module.named_parameters() if n.endswith(sum(ends, ()))}
    rows = {n for n in names if n.endswith(ends[0])}
    assert (diary.trained[0], diary.trained[-1]) == ((names - rows, rows) if two_step else (names, names))
    assert all(p.requires_grad for p in module.parameters())
    assert diary.losses[-1] < diary.losses[0]
    resumed, _, again, _ = fit(recovery, ckpt_path=tmp_path / "step=8.ckpt", **settings)
    assert again.losses == diary.losses[-len(again.losses) :]
    assert torch.equal(logits(resumed.model), logits(module.model))
    loaded = LM.load_from_checkpoint(tmp_path / "step=8.ckpt")
    assert {type(layer) for layer in compressed(loaded)} == {PivotedLinear, ColumnPivotedLinear}


def test_pivot_rows_keep_no_components_apart():
    with pytest.raises(ConfigError, match="acts on single components, and storage 'pivoted'"):
        short(storage="pivoted", recovery=SingularValueRecovery())


def test_the_rate_has_a_schedule_of_its_own_over_the_steps_left():
    _, _, diary, _ = fit(FactorRecovery(lr=0.1, schedule="linear", warmup=0.0))
    assert diary.rates == pytest.approx([0.1 * (1 - step / 10) for step in range(10)])
    _, _, diary, _ = fit(FactorRecovery(lr=0.1, schedule="linear", warmup=0.0, two_step=True))
    assert diary.rates == pytest.approx([0.1 * (1 - step / 5) for step in range(5)] * 2)
    _, _, diary, _ = fit(FactorRecovery(lr=None))
    assert diary.rates == [1e-3] * 10


def test_the_merged_model_is_the_one_that_was_trained():
    class Last(L.Callback):
        def on_train_end(self, trainer, pl_module):
            assert on(pl_module)
            self.logits = logits(pl_module.model)

    last = Last()
    module, *_ = fit(LoRARecovery(**LORA, lr=1e-1), last)
    torch.testing.assert_close(logits(module.model), last.logits, rtol=1e-4, atol=1e-5)


def test_recovery_lowers_the_loss_of_one_batch():
    _, _, diary, _ = fit(FactorRecovery(lr=5e-2), batches=token_batches(1) * 40, max_steps=40)
    assert diary.losses[-1] < diary.losses[0] - 0.3


def test_adapters_stay_where_they_are_not_to_be_merged():
    module, *_ = fit(LoRARecovery(**LORA, merge=False, lr=1e-2))
    assert on(module)
    expected = logits(module.model)
    merge_adapters(module)
    assert is_plain(module)
    torch.testing.assert_close(logits(module.model), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match=r"recovery\.merge"):
        short(storage="remap", recovery=LoRARecovery(merge=False))
    with pytest.raises(ConfigError, match="scale of components"):
        short(storage="remap", rows_in_16_bits="loss_aware", recovery=FactorRecovery())


def test_a_copy_of_the_module_in_a_fit_has_the_loss_of_its_own():
    class Copies(L.Callback):
        def on_train_end(self, trainer, pl_module):
            assert "training_step" in pl_module.__dict__
            self.copy = copy.deepcopy(pl_module)

    copies, batch = Copies(), token_batches(1)[0]
    fit(FactorRecovery(loss="distill"), copies)
    copies.copy.eval()
    assert torch.equal(copies.copy.training_step(batch, 0), copies.copy.model(**batch).loss)


def test_other_parameters_are_trained_too_where_they_are_named():
    _, _, diary, _ = fit(LoRARecovery(**LORA, targets=["o_proj"], also_train=["*norm.weight"]))
    assert all("o_proj" in n or n.endswith("norm.weight") for n in diary.trained[0])
    assert any("o_proj" in n for n in diary.trained[0])
    assert any(n.endswith("model.norm.weight") for n in diary.trained[0])


class Teaches(L.Callback):
    """Compares the loss that is trained on with the divergence from the model before compression."""

    def __init__(self, dense, share):
        self.dense, self.share, self.differences = copy.deepcopy(dense).eval(), share, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if compression(trainer).phase is Phase.RECOVER:
            with torch.no_grad():
                output = pl_module.model(**batch)
                found = divergence(output.logits.flatten(0, 1), self.dense(**batch).logits.flatten(0, 1), 2.0)
                self.expected = float((1 - self.share) * output.loss + self.share * found)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if hasattr(self, "expected"):
            self.differences.append(abs(float(outputs["loss"]) - self.expected))


def sharp():
    """A model whose predictions are not all alike."""
    module = LM()
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.mul_(4)
    return module


@pytest.mark.parametrize(("loss", "share"), [("distill", 1.0), ("both", 0.3)])
def test_the_loss_is_the_divergence_from_the_dense_model(loss, share):
    module = sharp()
    teaches = Teaches(module.model, share)
    recovery = FactorRecovery(loss=loss, distill_weight=0.3, temperature=2.0, teacher_dtype="float32")
    fit(recovery, teaches, module=module, compress={"corrections": 1}, max_steps=24, batches=token_batches(24))
    assert len(teaches.differences) > 5
    assert max(teaches.differences) < 1e-5


def test_saved_predictions_teach_as_the_model_in_memory_does(tmp_path):
    batches = token_batches(24)
    settings = {"loss": "distill", "teacher_dtype": "float32", "lr": 1e-2}
    _, _, memory, _ = fit(FactorRecovery(**settings), module=sharp(), batches=batches)
    save_predictions(sharp().model, batches, tmp_path / "top", top=97, progress=False)
    _, _, saved, _ = fit(FactorRecovery(**settings, teacher=str(tmp_path / "top")), module=sharp(), batches=batches)
    assert saved.losses == pytest.approx(memory.losses, rel=0.02)
    with pytest.raises(TeacherError, match="no prediction"):
        fit(FactorRecovery(**settings, teacher=str(tmp_path / "top")), batches=token_batches(14, seed=1))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(precision):
    recovery = LoRARecovery(**LORA, loss="both", two_step=True, lr=1e-2)
    module, _, diary, _ = fit(recovery, precision=precision)
    assert all(torch.isfinite(torch.tensor(loss)) for loss in diary.losses)
    assert is_plain(module)
    expected = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    assert {p.dtype for p in module.parameters()} == {expected}


def test_storage_in_8_bits_takes_the_merged_factors():
    module, *_ = fit(LoRARecovery(**LORA), compress={"storage": "remap", "prune_ratio": 0.5})
    assert not on(module)
    assert not any(isinstance(m, LowRankLinear) for m in module.modules())


def test_loggers_are_told(tmp_path):
    logger = CSVLogger(tmp_path)
    recovery = LoRARecovery(**LORA, loss="distill", two_step=True)
    fit(recovery, LearningRateMonitor("step"), logger=logger, log_every_n_steps=1)
    logger.save()
    metrics = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    assert {"zssvd/distillation", "zssvd/recovery_stage", "lr-AdamW"} <= set(metrics[0].split(","))


class Poison(L.Callback):
    """Makes gradients of one batch of the recovery NaN."""

    def __init__(self, at):
        self.left = at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if compression(trainer).phase is Phase.RECOVER:
            self.left -= 1

    def on_after_backward(self, trainer, pl_module):
        if self.left == 0:
            for parameter in pl_module.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(torch.nan)
                    break


@pytest.mark.parametrize(("way", "step"), [("lora", 9), ("factors", 11), ("factors", 9), ("factors", NEEDED)])
def test_the_last_good_state_is_kept_when_training_diverges(way, step):
    class Explodes(L.Callback):
        """Has a step go wrong whose consequences are seen in the next batch."""

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if compression(trainer).report is not None and trainer.global_step == step:
                with torch.no_grad():
                    next(p for p in pl_module.parameters() if p.requires_grad).fill_(torch.inf)

    module, diary = LM(), Diary()
    callback = short(corrections=0, calibration_batches=NEEDED, recovery=WAYS[way])
    with pytest.raises(DivergedError, match="the model has the last weights back"):
        trainer(callback, diary, Explodes(), max_steps=14).fit(module, loader(token_batches(14)))
    assert is_plain(module)
    assert all(torch.isfinite(p).all() for p in module.parameters())
    if way == "factors" and step > NEEDED:  # the weights that the batch before was run with, or the stage began with
        kept = diary.weights[-1 if step == 9 else -2]
        assert all(torch.equal(kept[n], p) for n, p in module.named_parameters())
    assert all(p.requires_grad for p in module.parameters())
    assert "training_step" not in module.__dict__


def test_a_gradient_that_is_not_finite_is_not_trained_on():
    module, diary = LM(), Diary()
    callback = short(corrections=0, calibration_batches=NEEDED, recovery=FactorRecovery())
    with pytest.raises(DivergedError):
        trainer(callback, diary, Poison(4), max_steps=14).fit(module, loader(token_batches(14)))
    assert all(torch.equal(diary.weights[-2][n], p) for n, p in module.named_parameters())


@pytest.mark.parametrize(
    ("recovery", "error", "message"),
    [
        (LoRARecovery(rank=8, clip_rank=False), RecoveryError, "is not below the smaller size"),
        (LoRARecovery(targets=["q_prj"]), TargetError, "'q_prj', which matches no layer .* did you mean"),
        (FactorRecovery(also_train=["*nothing*"]), RecoveryError, "matches no parameter"),
        (FactorRecovery(loss="distill", teacher="/nowhere"), TeacherError, "no predictions"),
        (LoRARecovery(clip_rank=True, peft={"exclude_modules": ".*"}), RecoveryError, "nothing to train"),
    ],
)
def test_what_cannot_be_recovered_is_refused_with_the_model_as_it_was(recovery, error, message):
    module = LM()
    before = {n: p.clone() for n, p in module.named_parameters()}
    with pytest.raises(error, match=message):
        fit(recovery, module=module)
    assert {n: p.shape for n, p in module.named_parameters()} == {n: p.shape for n, p in before.items()}
    assert all(torch.equal(p, before[n]) and p.requires_grad for n, p in module.named_parameters())
    assert not {"training_step", "configure_optimizers"} & module.__dict__.keys()


def test_a_teacher_that_does_not_fit_is_refused_before_calibration(monkeypatch):
    monkeypatch.setattr("zssvd_lightning.model.dense_copy.free_bytes", lambda device: 10)
    seen = []

    class Counts(L.Callback):
        def on_train_batch_start(self, *_):
            seen.append(1)

    with pytest.raises(TeacherError, match="save_predictions"):
        fit(FactorRecovery(loss="both"), Counts())
    assert not seen


def test_a_training_step_that_detaches_is_told_so():
    class Detached(LM):
        def training_step(self, batch, batch_idx):
            self.steps = getattr(self, "steps", 0) + 1
            loss = self.model(**batch).loss
            return loss if self.steps <= NEEDED else loss.detach() * torch.ones((), requires_grad=True)

    with pytest.raises(RecoveryError, match="no gradient has come"):
        fit(FactorRecovery(), module=Detached())


def test_a_batch_without_a_loss_is_left_out():
    class Choosy(LM):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 8 else super().training_step(batch, batch_idx)

    module, callback, diary, _ = fit(FactorRecovery(), module=Choosy())
    assert callback.phase is Phase.DONE
    assert len(diary.trained) == 10
    assert is_plain(module)


class Ruins(L.Callback):
    """Has a step go too far."""

    def __init__(self, step):
        self.step = step

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.step - 1 and compression(trainer).phase is Phase.RECOVER:
            for group in optimizer.param_groups:
                group["lr"] = 1e38


@pytest.mark.parametrize("step", [9, 14])
def test_what_is_ruined_when_a_stage_ends_or_the_fit_is_not_kept(step):
    module = LM()
    with pytest.raises(DivergedError):
        fit(FactorRecovery(two_step=True), Ruins(step), module=module)
    assert is_plain(module)
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert max(float(p.detach().abs().max()) for p in module.parameters()) < 100


def test_an_encoder_decoder_is_distilled_where_its_labels_count():
    class Pairs(CausalLM):
        def __init__(self):
            torch.manual_seed(0)
            super().__init__(tiny_t5())

    batches = sequence_pairs(14)
    batches[6]["labels"][:, 4:] = -100
    _, callback, diary, _ = fit(FactorRecovery(loss="distill"), module=Pairs(), batches=batches)
    assert callback.phase is Phase.DONE
    assert all(0 <= loss < 1 for loss in diary.losses)
    with pytest.raises(TeacherError, match="decoder"):
        fit(FactorRecovery(loss="distill", teacher="anywhere"), module=Pairs(), batches=batches)


def test_accumulation_and_clipping():
    recovery = LoRARecovery(**LORA, loss="both", two_step=True)
    settings = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "max_steps": 8}
    module, callback, diary, _ = fit(recovery, batches=token_batches(16), **settings)
    assert callback.phase is Phase.DONE
    assert is_plain(module)
    assert diary.trained[0] != diary.trained[-1]


def saved(tmp_path, recovery, **settings):
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1, save_last=True)
    return saving, *fit(recovery, saving, enable_checkpointing=True, **settings)


def test_checkpoints_of_the_recovery_are_tested_and_loaded_as_plain_low_rank_models(tmp_path):
    recovery = LoRARecovery(**LORA, lr=1e-1)
    saved(tmp_path, recovery)
    path = str(tmp_path / "step=12.ckpt")
    assert any("lora_A" in name for name in torch.load(path)["state_dict"])

    loaded = LM.load_from_checkpoint(path)
    assert is_plain(loaded)
    assert all(p.requires_grad for p in loaded.parameters())
    seen = {}

    class Tests(LM):
        def test_step(self, batch, batch_idx):
            seen["logits"] = logits(self.model)

    tested = Tests()
    trainer(short(recovery=recovery)).test(tested, loader(token_batches(1)), ckpt_path=path, verbose=False)
    assert is_plain(tested)
    assert all(p.requires_grad for p in tested.parameters())
    torch.testing.assert_close(logits(tested.model), seen["logits"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(loaded.model), seen["logits"], rtol=1e-4, atol=1e-5)

    weights = trainer(short(), enable_checkpointing=True)
    weights.test(Tests(), loader(token_batches(1)), ckpt_path=path, verbose=False)
    torch.testing.assert_close(logits(loaded.model), seen["logits"], rtol=1e-4, atol=1e-5)


def test_a_checkpoint_is_gone_on_from_with_the_same_recovery_only(tmp_path):
    saved(tmp_path, LoRARecovery(**LORA))
    path = str(tmp_path / "step=9.ckpt")
    for other in (None, LoRARecovery(**LORA, lr=5e-3), FactorRecovery()):
        with pytest.raises(CheckpointError, match="go on with the same"):
            fit(other, ckpt_path=path)
    before = str(tmp_path / "step=3.ckpt")
    _, callback, diary, _ = fit(FactorRecovery(), ckpt_path=before)
    assert callback.phase is Phase.DONE
    assert diary.trained


def test_a_checkpoint_of_after_the_fit_is_refused_for_another(tmp_path):
    *_, fitted = fit(LoRARecovery(**LORA))
    fitted.save_checkpoint(tmp_path / "after.ckpt")
    assert is_plain(LM.load_from_checkpoint(tmp_path / "after.ckpt"))
    with pytest.raises(CheckpointError, match="saved after its fit"):
        fit(LoRARecovery(**LORA), ckpt_path=str(tmp_path / "after.ckpt"), max_steps=20)


def test_a_second_fit_trains_by_the_modules_own_optimizer():
    module, callback, _, _ = fit(LoRARecovery(**LORA))
    second = trainer(callback, max_steps=3)
    second.fit(module, loader(token_batches(3)))
    assert second.optimizers[0].param_groups[0]["lr"] == 1e-3
    assert sum(len(g["params"]) for g in second.optimizers[0].param_groups) == len(list(module.parameters()))
    assert is_plain(module)


def test_a_second_fit_can_be_gone_on_with(tmp_path):
    module, callback, _, _ = fit(LoRARecovery(**LORA))
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    trainer(callback, saving, max_steps=4, enable_checkpointing=True).fit(module, loader(token_batches(4)))
    again = short(corrections=0, calibration_batches=NEEDED, recovery=LoRARecovery(**LORA))
    other = LM()
    trainer(again, max_steps=4).fit(other, loader(token_batches(4)), ckpt_path=str(tmp_path / "step=2.ckpt"))
    assert is_plain(other)


def test_weights_alone_are_tested_and_loaded(tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1, save_weights_only=True)
    fit(LoRARecovery(**LORA, lr=1e-1), saving, enable_checkpointing=True)
    path = str(tmp_path / "step=12.ckpt")
    loaded, tested = LM.load_from_checkpoint(path), LM()
    assert is_plain(loaded)
    (result,) = trainer(short()).validate(tested, loader(token_batches(1)), path, verbose=False)
    assert result["val_loss"] == pytest.approx(float(loaded.model.eval()(**token_batches(1)[0]).loss), rel=1e-4)
    assert is_plain(tested)


def test_nothing_of_a_recovery_that_could_not_begin_is_kept():
    recovery = LoRARecovery(rank=8, clip_rank=False, loss="distill")
    module, callback = LM(), short(corrections=0, calibration_batches=NEEDED, recovery=recovery)
    with pytest.raises(RecoveryError, match="not below"):
        trainer(callback, max_steps=14).fit(module, loader(token_batches(14)))
    assert callback.state_dict()["recovery"]["teacher"] == {}


def test_a_checkpoint_on_an_exception_in_the_recovery_can_be_gone_on_from(tmp_path):
    class Stops(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 9:
                raise RuntimeError("out of patience")

    recovery = LoRARecovery(**LORA, loss="distill", two_step=True)
    whole, *_ = fit(recovery, max_epochs=-1)
    saving = ModelCheckpoint(tmp_path, save_on_exception=True, save_top_k=0, monitor=None)
    module = LM()
    with pytest.raises(RuntimeError, match="out of patience"):
        fit(recovery, Stops(), saving, module=module, enable_checkpointing=True, max_epochs=-1)
    assert is_plain(module)
    (path,) = tmp_path.glob("*.ckpt")
    module, callback, *_ = fit(recovery, ckpt_path=str(path), batches=token_batches(14)[9:], max_epochs=-1)
    assert callback.phase is Phase.DONE
    for (name, value), expected in zip(module.state_dict().items(), whole.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, msg=name)
