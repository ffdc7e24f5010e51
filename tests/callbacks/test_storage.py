"""Storage in 8 bits: factors are trained in floating point, and kept in 8 bits from the end of the fit on."""

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support.callbacks import short
from support.models import CausalLM, loader, logits, tiny_llama, token_batches, trainer

from zssvd_lightning import (
    CompressionConfig,
    LowRankCheckpointMixin,
    LowRankLinear,
    compress,
    from_pretrained,
    save_pretrained,
)
from zssvd_lightning.compression.pipeline import plan
from zssvd_lightning.errors import CheckpointError, ConfigError, PlanError
from zssvd_lightning.layers.int8 import EightBitLinear, Int8LowRankLinear
from zssvd_lightning.serialization.specs import specs_of

REMAP = {"prune_ratio": 0.4, "corrections": 0, "storage": "remap"}


class Watches(L.Callback):
    """Notes which forms layers have while the factors are trained, and the weights at the end of training."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.forms = {type(module) for module in pl_module.modules()}

    def on_train_end(self, trainer, pl_module):
        self.trained = copy.deepcopy(pl_module.model)


class LM(LowRankCheckpointMixin, CausalLM):
    pass


def fit(settings, *callbacks, **limits):
    module, callback, watches = LM(), short(**settings), Watches()
    fitted = trainer(callback, watches, *callbacks, **({"max_epochs": 3} | limits))
    fitted.fit(module, loader(token_batches()))
    return module, callback, watches, fitted


def loss(module, batch):
    return module.model(**batch).loss


@pytest.mark.parametrize("rows", ["last", "loss_aware"])
def test_the_fit_trains_factors_and_leaves_them_in_8_bits(tmp_path, rows):
    module, callback, watches, _ = fit(REMAP | {"rows_in_16_bits": rows})
    assert LowRankLinear in watches.forms
    assert not any(issubclass(form, EightBitLinear) for form in watches.forms)
    low_rank = {name for name, layer in callback.report.layers.items() if layer.rank is not None}
    assert {name for name, spec in specs_of(module).items() if spec["kind"] == "int8_low_rank"} == low_rank
    torch.testing.assert_close(logits(module.model), logits(watches.trained), atol=0.05, rtol=0.05)
    assert not torch.equal(logits(module.model), logits(watches.trained))
    wide = {name: (spec["rows"], spec["columns"]) for name, spec in specs_of(module).items()}
    last = {
        n: tuple(max(0, size - min(callback.report.layers[n].shape)) for size in callback.report.layers[n].shape)
        for n in wide
    }
    assert (wide == last) == (rows == "last")
    save_pretrained(module.model, tmp_path / "m", report=callback.report)
    assert torch.equal(logits(from_pretrained(tmp_path / "m")), logits(module.model))


def test_hq_has_dense_layers_in_8_bits_too():
    include = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    module, callback, _, _ = fit({"prune_ratio": 0.55, "corrections": 1, "storage": "hq", "include": include})
    assert any(layer.rank is None for layer in callback.report.layers.values())
    assert set(specs_of(module)) == set(callback.report.layers)
    assert callback.report.reached >= 0.55


def test_a_fit_without_training_ends_like_compress():
    module, reference = LM(), LM()
    reference.load_state_dict(module.state_dict())
    batches = token_batches()
    compress(reference, batches, CompressionConfig(**REMAP, rank_multiple=1), progress=False, loss=loss)
    trainer(short(**REMAP), max_epochs=1).fit(module, loader(batches))
    assert specs_of(module) == specs_of(reference)
    torch.testing.assert_close(logits(module.model), logits(reference.model), atol=1e-3, rtol=1e-3)


def test_checkpoints_of_the_fit_hold_factors_and_are_gone_on_from(tmp_path):
    settings = REMAP | {"rows_in_16_bits": "loss_aware"}
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    module, _, _, fitted = fit(settings, saving, enable_checkpointing=True, default_root_dir=tmp_path)
    resumed, callback = LM(), short(**settings)
    second = trainer(callback, max_epochs=3)
    second.fit(resumed, loader(token_batches()), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert specs_of(resumed) == specs_of(module)
    assert torch.equal(logits(resumed.model), logits(module.model))
    fitted.validate(module, loader(token_batches()), ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False)
    assert not any(isinstance(m, EightBitLinear) for m in module.modules())  # as the checkpoint has it


@pytest.mark.parametrize("other", [{"storage": "factors"}, {"rows_in_16_bits": "loss_aware"}])
def test_a_fit_is_gone_on_from_with_the_same_storage(tmp_path, other):
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    fit(REMAP, saving, enable_checkpointing=True, default_root_dir=tmp_path)
    with pytest.raises(CheckpointError, match=next(iter(other))):
        trainer(short(**(REMAP | other)), max_epochs=4).fit(
            LM(), loader(token_batches()), ckpt_path=tmp_path / "epoch=1.ckpt"
        )


def test_a_checkpoint_of_after_the_fit_is_not_gone_on_from(tmp_path):
    _, _, _, fitted = fit(REMAP)
    fitted.save_checkpoint(tmp_path / "end.ckpt")
    with pytest.raises(CheckpointError, match="saved after its fit"):
        trainer(short(**REMAP), max_epochs=4).fit(LM(), loader(token_batches()), ckpt_path=tmp_path / "end.ckpt")


def test_a_bfloat16_model_goes_back_to_factors_of_its_type(tmp_path):
    module, callback = LM(tiny_llama().bfloat16()), short(**REMAP)
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    fitted = trainer(callback, saving, max_epochs=3, enable_checkpointing=True, default_root_dir=tmp_path)
    fitted.fit(module, loader(token_batches()))
    fitted.validate(module, loader(token_batches()), ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}


def test_plans_are_for_one_storage(tmp_path):
    plan(LM(), token_batches(), CompressionConfig(0.6, corrections=0, storage="hq"), progress=False, loss=loss).write(
        tmp_path / "p.yaml"
    )
    module = LM()
    with pytest.raises(PlanError, match="for storage 'hq', and it is to be 'factors'"):
        compress(module, token_batches(), CompressionConfig(plan=str(tmp_path / "p.yaml")), progress=False, loss=loss)
    followed = CompressionConfig(plan=str(tmp_path / "p.yaml"), corrections=0, storage="hq")
    assert compress(module, token_batches(), followed, progress=False, loss=loss).reached >= 0.6


def test_a_checkpoint_in_8_bits_is_loaded_as_such(tmp_path):
    module, _, _, fitted = fit(REMAP)
    fitted.save_checkpoint(tmp_path / "end.ckpt", weights_only=True)
    again = LM.load_from_checkpoint(tmp_path / "end.ckpt")
    assert any(isinstance(m, Int8LowRankLinear) for m in again.modules())
    assert torch.equal(logits(again.model), logits(module.model))
    again.load_state_dict(LM().state_dict())
    assert not specs_of(again)
    assert not hasattr(again.model.config, "quantization_config")


def test_a_failed_fit_leaves_a_dense_model():
    class Fails(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            raise ZeroDivisionError

    module = LM()
    with pytest.raises(ZeroDivisionError):
        trainer(short(**REMAP), Fails(), max_epochs=3).fit(module, loader(token_batches()))
    assert not specs_of(module)
    assert type(module.model.config).__name__ == "LlamaConfig"
    assert not hasattr(module.model.config, "quantization_config")


@pytest.mark.parametrize("other", [{"storage": "hq"}, {"storage": "factors"}, {"storage": "remap", "metric": "none"}])
def test_rows_are_weighed_where_there_is_something_to_weigh(other):
    with pytest.raises(ConfigError, match="needs storage 'remap' and metric 'input'"):
        CompressionConfig(0.6, rows_in_16_bits="loss_aware", **other)
