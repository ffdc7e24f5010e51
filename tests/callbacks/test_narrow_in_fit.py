"""Narrower hidden widths in a fit: trained on afterwards, resumed at any step, loaded without a Trainer."""

import copy

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support.callbacks import short
from support.models import CausalLM, padded_batches, tiny_llama, trainer
from torchdata.stateful_dataloader import StatefulDataLoader

from zssvd_lightning import load_from_checkpoint
from zssvd_lightning.layers.narrow import NarrowLinear

COUNT = 12
SETTINGS = {
    "preset": "best",
    "storage": "factors",
    "narrow": True,
    "prune_ratio": 0.3,
    "corrections": 1,
    "correction_batches": 2,
    "calibration_batches": 3,
    "start_step": 2,
}


def fit(module, *callbacks, ckpt_path=None):
    batches = StatefulDataLoader(padded_batches(COUNT), batch_size=None)
    trainer(*callbacks, max_steps=COUNT, enable_checkpointing=True).fit(module, batches, ckpt_path=ckpt_path)


def test_a_fit_resumes_to_the_same_weights_from_checkpoints_of_any_step(tmp_path):
    torch.manual_seed(0)
    whole = CausalLM(tiny_llama())
    start, run = copy.deepcopy(whole), short(**SETTINGS)
    fit(whole, run, ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1))
    narrow = {name for name, layer in whole.named_modules() if isinstance(layer, NarrowLinear)}
    assert narrow
    assert {f"model.{name.removeprefix('model.')}" for name in narrow} == {
        name for name, layer in run.report.layers.items() if layer.units is not None
    }
    phases = set()
    for step in (3, 6, 10):
        path = tmp_path / f"step={step}.ckpt"
        (state,) = [s for key, s in torch.load(path, weights_only=True)["callbacks"].items() if key.startswith("ZSSVD")]
        phases.add(state["phase"])
        resumed = copy.deepcopy(start)
        fit(resumed, short(**SETTINGS), ckpt_path=path)
        assert whole.state_dict().keys() == resumed.state_dict().keys()
        for name, value in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], value), (step, name)
    assert phases == {"calibrate", "correct", "recover"}
    loaded = load_from_checkpoint(CausalLM, tmp_path / f"step={COUNT}.ckpt", model=tiny_llama(), weights_only=True)
    assert {name for name, layer in loaded.named_modules() if isinstance(layer, NarrowLinear)} == narrow
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in loaded.state_dict().items())
