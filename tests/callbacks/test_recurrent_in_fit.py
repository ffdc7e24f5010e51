"""Compression of recurrent modules in a fit: whole until it starts, and after any failure; resumed at any step."""

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support.attention import sequence_batches
from support.callbacks import short
from support.models import assert_same_state, state_of, trainer
from support.recurrent import SequenceReader
from torchdata.stateful_dataloader import StatefulDataLoader

from zssvd_lightning import LoRARecovery, load_from_checkpoint
from zssvd_lightning.errors import UnsupportedTrainingError
from zssvd_lightning.layers.apart.recurrent import recurrences
from zssvd_lightning.serialization.specs import ranks_of
from zssvd_lightning.strategies import SingleDeviceAdapter

COUNT = 20


def callback(**settings):
    return short(**({"prune_ratio": 0.5, "calibration_batches": 4, "start_step": 2, "recurrent": True} | settings))


def fit(module, *callbacks, ckpt_path=None, **settings):
    batches = StatefulDataLoader(sequence_batches(COUNT), batch_size=None)
    given = {"max_steps": COUNT, "enable_checkpointing": True} | settings
    trainer(*callbacks, **given).fit(module, batches, ckpt_path=ckpt_path)


def test_a_fit_resumes_to_the_same_weights_from_checkpoints_of_any_phase(tmp_path):
    whole = SequenceReader()
    start = copy.deepcopy(whole)
    fit(whole, callback(), ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1))
    assert any(".hh_l" in name for name in ranks_of(whole))
    phases = {}
    for step in (1, 4, 7, 18):
        path = tmp_path / f"step={step}.ckpt"
        saved = torch.load(path, weights_only=True)
        (state,) = [state for key, state in saved["callbacks"].items() if key.startswith("ZSSVD")]
        phases[state["phase"]] = "net.lstm.weight_hh_l1_reverse" in saved["state_dict"]
        resumed = copy.deepcopy(start)
        fit(resumed, callback(), ckpt_path=path)
        assert whole.state_dict().keys() == resumed.state_dict().keys()
        for name, value in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], value), (step, name)
    assert phases == {"wait": True, "calibrate": True, "correct": True, "recover": False}
    loaded = load_from_checkpoint(SequenceReader, tmp_path / f"step={COUNT}.ckpt", weights_only=True)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_the_factors_train_with_adapters_of_a_recovery_in_bfloat16():
    module, run = SequenceReader(), callback(recovery=LoRARecovery(lr=1e-2))
    fit(module, run, precision="bf16-mixed", accumulate_grad_batches=2, max_epochs=2)
    assert run.report.reached >= 0.5
    assert list(recurrences(module))


def test_a_fit_that_fails_while_calibrating_has_its_modules_again():
    module = SequenceReader()
    modules = dict(module.named_modules())

    class Fails(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 4:
                assert len(list(recurrences(pl_module))) == 2
                raise KeyError("stop")

    with pytest.raises(KeyError):
        fit(module, callback(), Fails())
    assert dict(module.named_modules()) == modules


def test_under_a_strategy_that_cannot_they_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(SingleDeviceAdapter, "compresses_again", False)
    module = SequenceReader()
    before = state_of(module)
    with pytest.raises(UnsupportedTrainingError, match=r"net.lstm \(LSTM\) reads its matrices.*set recurrent to False"):
        fit(module, callback())
    assert_same_state(before, state_of(module))
