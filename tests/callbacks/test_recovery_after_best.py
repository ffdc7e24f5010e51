"""LoRA after the preset `best`, whose layers are pivot rows and coefficients: trained, saved, resumed, and refused."""

import math

import lightning as L
import peft
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support.callbacks import short
from support.models import VOCABULARY, CausalLM, loader, logits, tiny_gpt2, tiny_llama, token_batches, trainer
from torch.utils.data import DataLoader, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from zssvd_lightning import LowRankCheckpointMixin, Phase, from_pretrained, save_pretrained
from zssvd_lightning.errors import RecoveryError, TargetError, TeacherError
from zssvd_lightning.layers.base import CompressedLinear
from zssvd_lightning.layers.pivoted import PivotedLinear
from zssvd_lightning.layers.pivoted_columns import ColumnPivotedLinear
from zssvd_lightning.model.adapters import FOLDER, merge_adapters, on
from zssvd_lightning.recovery.methods import FactorRecovery, LoRARecovery

BEST = {"preset": "best", "corrections": 2, "prune_ratio": 0.5, "calibration_batches": 4, "correction_batches": 2}
NEEDED = 8
"""Batches until the model of `BEST` is low-rank."""


def sequences(count, seed):
    """Tokens that each follow from the one before, by a table without a pattern, apart from the first."""
    table = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(7))
    batches = token_batches(count, seed=seed)
    for batch in batches:
        ids = batch["input_ids"]
        for t in range(1, ids.shape[1]):
            ids[:, t] = torch.where(ids[:, t] % 4 > 0, table[ids[:, t - 1]], ids[:, t])
        batch["labels"] = ids.clone()
    return batches


@pytest.fixture(scope="module")
def learned():
    """Weights of a Llama that has learned the sequences."""
    torch.manual_seed(0)
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 250)
    for batch in sequences(250, seed=1):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        schedule.step()
    return model.state_dict()


class LM(LowRankCheckpointMixin, CausalLM):
    def __init__(self, weights=None, build=tiny_llama):
        torch.manual_seed(0)
        super().__init__(build())
        if weights is not None:
            self.model.load_state_dict(weights)


class Diary(L.Callback):
    """Batches seen, and the loss on held-out batches when the recovery begins."""

    def __init__(self, callback):
        self.callback, self.batches, self.truncated, self.losses = callback, 0, None, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches += 1
        if self.callback.phase is Phase.RECOVER and self.truncated is None:
            self.truncated = held_out_loss(pl_module.model)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.truncated is not None:
            self.losses.append(float(outputs["loss"]))


def fit(recovery, *callbacks, module=None, steps=12, data=None, ckpt_path=None, diary=None, **settings):
    compress = BEST | {key: settings.pop(key) for key in list(settings) if key in ("plan", "targets", "storage")}
    module, callback = module or LM(), short(**compress, recovery=recovery)
    diary = diary or Diary(callback)
    diary.callback = callback
    fitted = trainer(callback, diary, *callbacks, **({"max_steps": NEEDED + steps} | settings))
    data = StatefulDataLoader(sequences(NEEDED + steps, seed=2), batch_size=None) if data is None else data
    fitted.fit(module, data, ckpt_path=ckpt_path)
    return module, callback, diary


def held_out_loss(model):
    training = model.training
    with torch.no_grad():
        loss = sum(float(model.eval()(**batch).loss) for batch in sequences(4, seed=3)) / 4
    model.train(training)
    return loss


def assert_as_reported(model, report):
    """All low-rank layers are plain pivoted ones, with as many numbers as the report says."""
    layers = {name: model.get_submodule(name) for name in report.within("model").layers}
    ranks = {name: layer.rank for name, layer in layers.items() if isinstance(layer, CompressedLinear)}
    assert {type(layers[name]) for name in ranks} <= {PivotedLinear, ColumnPivotedLinear}
    assert ranks == {name: layer.rank for name, layer in report.within("model").layers.items() if layer.rank}
    numbers = sum(p.numel() for layer in layers.values() for n, p in layer.named_parameters() if "bias" not in n)
    assert numbers == report.parameters_after


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"two_step": True},
        {"peft": {"init_lora_weights": "pissa"}},
        {"peft": {"use_dora": True}, "loss": "both"},
    ],
    ids=["plain", "two steps", "pissa", "dora, distilled"],
)
def test_it_lowers_the_loss_in_the_size_that_is_reported(tmp_path, learned, settings):
    module, callback, diary = fit(LoRARecovery(rank=4, lr=3e-3, **settings), module=LM(learned), steps=60)
    dense, recovered = held_out_loss(LM(learned).model), held_out_loss(module.model)
    assert dense < 0.5 * math.log(VOCABULARY)
    assert recovered - dense < 0.7 * (diary.truncated - dense)
    assert not on(module)
    assert_as_reported(module.model, callback.report)
    save_pretrained(module.model, tmp_path / "saved")
    assert_as_reported(from_pretrained(tmp_path / "saved"), callback.report)
    assert torch.equal(logits(from_pretrained(tmp_path / "saved")), logits(module.model))


def test_layers_that_store_their_weights_transposed_and_have_biases_recover(learned):
    module, callback, _ = fit(LoRARecovery(rank=4, lr=1e-2, also_train=["*ln_f*"]), module=LM(build=tiny_gpt2))
    assert not on(module)
    assert_as_reported(module.model, callback.report)
    assert all(p.requires_grad for p in module.parameters())


def test_it_is_saved_beside_the_compressed_model(tmp_path):
    module, callback, _ = fit(LoRARecovery(rank=4, lr=1e-2, merge=False))
    assert on(module)
    expected = logits(module.model)
    save_pretrained(module.model, tmp_path / "saved", report=callback.report)
    base = from_pretrained(tmp_path / "saved")
    assert_as_reported(base, callback.report)
    assert not torch.allclose(logits(base), expected)
    beside = peft.PeftModel.from_pretrained(base, str(tmp_path / "saved" / FOLDER))
    torch.testing.assert_close(logits(beside), expected)
    merge_adapters(module)
    assert_as_reported(module.model, callback.report)
    torch.testing.assert_close(logits(module.model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"two_step": True, "loss": "both"}], ids=["plain", "two steps, distilled"])
def test_it_goes_on_from_any_checkpoint_to_the_same_weights(tmp_path, settings):
    recovery = LoRARecovery(rank=4, lr=1e-2, **settings)
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    module, _, diary = fit(recovery, saving, enable_checkpointing=True)
    for step in (5, NEEDED + 3, NEEDED + 6, NEEDED + 9):
        path = tmp_path / f"step={step}.ckpt"
        resumed, callback, again = fit(recovery, ckpt_path=str(path))
        assert callback.phase is Phase.DONE
        assert again.losses == diary.losses[-len(again.losses) :]
        assert torch.equal(logits(resumed.model), logits(module.model))
    path = tmp_path / f"step={NEEDED + 9}.ckpt"
    assert any("mixing.lora_A" in name for name in torch.load(path)["state_dict"])
    loaded, tested = LM.load_from_checkpoint(path), LM()
    trainer(short(**BEST, recovery=recovery)).validate(tested, loader(token_batches(1)), str(path), verbose=False)
    for one in (loaded, tested):
        assert not on(one)
        assert_as_reported(one.model, callback.report)
    torch.testing.assert_close(logits(tested.model), logits(loaded.model))


def test_a_rank_that_is_too_high_is_lowered_with_one_warning(caplog):
    module, callback, _ = fit(LoRARecovery(rank=30, merge=False, two_step=True))
    (said,) = [record.getMessage() for record in caplog.records if "recovery.rank" in record.getMessage()]
    low_rank = [layer.rank for layer in callback.report.layers.values() if layer.rank]
    assert f"recovery.rank 30 is too high for {len(low_rank)} of {len(low_rank)} layers, such as" in said
    assert on(module)
    for layer in on(module).values():
        part = layer.pivots if isinstance(layer, PivotedLinear) else layer.mixing
        assert part.r["default"] == min(part.in_features, part.out_features) - 1
    caplog.clear()
    fit(LoRARecovery(rank=2, targets=["gate_proj"]))
    assert not [record for record in caplog.records if "recovery.rank" in record.getMessage()]


def refused(error, message, recovery, **settings):
    """Checks that a recovery is refused before the first batch, with the model as it was."""
    diary, module = Diary(None), settings.pop("module", None) or LM()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(error, match=message):
        fit(recovery, diary=diary, module=module, **settings)
    assert diary.batches == 0
    assert module.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(p.requires_grad for p in module.parameters())
    assert not {"training_step", "configure_optimizers"} & module.__dict__.keys()


def plan(tmp_path, **ranks):
    """A plan of rank 12 for all layers, and others for layers that end in these names."""
    shapes = {name: tuple(m.weight.shape) for name, m in LM().named_modules() if name.endswith("_proj")}
    entries = "".join(f"  {name}: {{rank: {ranks.get(name.split('.')[-1], 12)}}}\n" for name in shapes)
    path = tmp_path / "plan.yaml"
    path.write_text(f"version: 1\nstorage: pivoted\nlayers:\n{entries}")
    return path


def test_ranks_of_a_plan_are_refused_before_calibration(tmp_path):
    path = plan(tmp_path, k_proj=4, o_proj="dense")
    message = r"LoRA of rank 4 on .*k_proj.pivots \(4, 32\) is not below"
    refused(RecoveryError, message, LoRARecovery(rank=4, clip_rank=False), plan=path)
    refused(RecoveryError, message, LoRARecovery(rank=4, clip_rank=False, two_step=True), plan=path)
    refused(RecoveryError, "nothing to train: 12 layers", LoRARecovery(targets=["o_proj"]), plan=path)
    recovery = LoRARecovery(rank=4, clip_rank=False, targets=["q_proj", "down_proj", "o_proj"])
    assert fit(recovery, plan=path, steps=4)[1].phase is Phase.DONE
    assert fit(LoRARecovery(rank=4), plan=path, steps=4)[1].phase is Phase.DONE


def test_a_rank_too_high_for_every_layer_is_refused_before_calibration():
    refused(RecoveryError, "is not below", LoRARecovery(rank=31, clip_rank=False))
    refused(
        RecoveryError,
        r"no rank .* suits .*k_proj.mixing \(15, 17\) is not below",
        LoRARecovery(rank=15, clip_rank=False, targets=["k_proj"]),
    )
    assert fit(LoRARecovery(rank=4, clip_rank=False, targets=["gate_proj"]), steps=4)[1].phase is Phase.DONE


class Endless(IterableDataset):
    def __iter__(self):
        yield from sequences(NEEDED + 4, seed=2)


def test_what_needs_the_end_of_training_is_refused_where_that_is_unknown():
    for limits in ({"max_steps": -1, "max_epochs": -1}, {"max_steps": -1, "max_epochs": 1}):
        data = DataLoader(Endless(), batch_size=None)
        settings = {"data": data, **limits}
        refused(RecoveryError, "neither max_steps nor max_epochs", LoRARecovery(rank=4), **settings)
        refused(RecoveryError, "two_step has to know", FactorRecovery(two_step=True, lr=None), **settings)
    _, callback, diary = fit(LoRARecovery(rank=4, schedule="constant"), **settings)
    assert callback.phase is Phase.DONE
    assert len(diary.losses) == 4


def test_what_has_nothing_to_train_is_refused_before_calibration():
    refused(RecoveryError, "nothing to train", LoRARecovery(rank=4, peft={"exclude_modules": ".*"}))
    refused(TargetError, "rank_pattern has", LoRARecovery(rank=4, peft={"rank_pattern": {r".*\.up": 2}}))


def test_a_student_outside_the_module_is_refused_before_calibration(monkeypatch):
    stranger = tiny_llama()
    monkeypatch.setattr("zssvd_lightning.ZSSVDCallback.student", lambda self, pl_module: stranger)
    refused(TeacherError, "is no part of the module", LoRARecovery(rank=4, loss="both"))
