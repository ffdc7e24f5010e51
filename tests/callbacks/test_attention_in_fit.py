"""Compression of attentions of torch in a fit: whole until it starts, and after any failure; resumed at any step."""

import lightning as L
import pytest
from support.attention import SequenceClassifier, sequence_batches
from support.callbacks import assert_resumes_from_any_phase, short
from support.models import assert_same_state, state_of, trainer
from torchdata.stateful_dataloader import StatefulDataLoader

from zssvd_lightning import LoRARecovery
from zssvd_lightning.errors import UnsupportedTrainingError
from zssvd_lightning.layers.apart.attention import projected
from zssvd_lightning.serialization.specs import ranks_of
from zssvd_lightning.strategies import SingleDeviceAdapter

COUNT = 20


def callback(**settings):
    return short(**({"prune_ratio": 0.5, "calibration_batches": 4, "start_step": 2} | settings))


def fit(module, *callbacks, ckpt_path=None, **settings):
    batches = StatefulDataLoader(sequence_batches(COUNT), batch_size=None)
    given = {"max_steps": COUNT, "enable_checkpointing": True} | settings
    trainer(*callbacks, **given).fit(module, batches, ckpt_path=ckpt_path)


def test_a_fit_resumes_to_the_same_weights_from_checkpoints_of_any_phase(tmp_path):
    module = SequenceClassifier()
    loaded = assert_resumes_from_any_phase(
        module, fit, callback, tmp_path, "net.encoder.layers.0.self_attn.in_proj_weight"
    )
    assert any(".self_attn." in name for name in ranks_of(module))
    assert loaded.net.encoder.use_nested_tensor is False


def test_the_factors_train_with_adapters_of_a_recovery_in_bfloat16():
    module, run = SequenceClassifier(), callback(recovery=LoRARecovery(lr=1e-2))
    fit(module, run, precision="bf16-mixed", accumulate_grad_batches=2, max_epochs=2)
    assert run.report.reached >= 0.5
    assert list(projected(module))


def test_a_fit_that_fails_while_calibrating_has_its_attentions_again():
    module = SequenceClassifier()
    modules = dict(module.named_modules())

    class Fails(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 4:
                assert len(list(projected(pl_module))) == 4
                raise KeyError("stop")

    with pytest.raises(KeyError):
        fit(module, callback(), Fails())
    assert dict(module.named_modules()) == modules
    assert module.net.encoder.use_nested_tensor is True


def test_under_a_strategy_that_cannot_they_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(SingleDeviceAdapter, "compresses_again", False)
    module = SequenceClassifier()
    before = state_of(module)
    with pytest.raises(
        UnsupportedTrainingError, match=r"self_attn \(MultiheadAttention\) reads its projections itself.*\* to ignore"
    ):
        fit(module, callback())
    assert_same_state(before, state_of(module))
