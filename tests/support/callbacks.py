"""Callbacks that several tests put into their Trainers."""

import copy
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from zssvd_lightning import Phase, Schedule, ZSSVDCallback, load_from_checkpoint


def scheduled(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of the callback from a flat mapping: fields of `Schedule` go into one."""
    names = {field.name for field in fields(Schedule)}
    schedule = Schedule(**{name: value for name, value in settings.items() if name in names})
    return {"schedule": schedule, **{name: value for name, value in settings.items() if name not in names}}


SHORTEST = {"prune_ratio": 0.3, "preset": "zs-svd-line-search", "correction_batches": 2, "progress": False}


def short(**settings: Any) -> ZSSVDCallback:
    """A compression of few batches; fields of `Schedule` may be given flat."""
    return ZSSVDCallback(**scheduled(SHORTEST | settings))


class Keeps(ZSSVDCallback):
    """Keeps the statistics of the first calibration."""

    kept = None

    def on_before_backward(self, trainer, pl_module, loss):
        if self.phase is Phase.CALIBRATE:
            self.kept = self.kept or self.statistics
        super().on_before_backward(trainer, pl_module, loss)


class Interrupt(L.Callback):
    """Fails after the batch of an optimizer step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.at:
            raise ConnectionError("gone")


def assert_resumes_from_any_phase(
    module: L.LightningModule,
    fit: Callable[..., None],
    callback: Callable[[], ZSSVDCallback],
    folder: Path,
    dense: str,
    **built_with: Any,
) -> L.LightningModule:
    """Fit a module, and check that a checkpoint of each phase goes on to the same weights; return the last one loaded.

    Args:
        module: the module, which is fitted in place in 20 steps.
        fit: fits a module with callbacks, from `ckpt_path`.
        callback: makes a compression that waits at step 1, and calibrates, corrects and recovers at 4, 7 and 18.
        folder: where the checkpoints go.
        dense: name of a weight that is there until the layers are replaced.
        built_with: arguments of the class of the module.
    """
    start = copy.deepcopy(module)
    fit(module, callback(), ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1))
    phases = {}
    for step in (1, 4, 7, 18):
        path = folder / f"step={step}.ckpt"
        saved = torch.load(path, weights_only=True)
        (state,) = [state for key, state in saved["callbacks"].items() if key.startswith("ZSSVD")]
        phases[state["phase"]] = dense in saved["state_dict"]
        resumed = copy.deepcopy(start)
        fit(resumed, callback(), ckpt_path=path)
        assert module.state_dict().keys() == resumed.state_dict().keys()
        for name, value in module.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], value), (step, name)
    assert phases == {"wait": True, "calibrate": True, "correct": True, "recover": False}
    loaded = load_from_checkpoint(type(module), folder / "step=20.ckpt", weights_only=True, **built_with)
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in loaded.state_dict().items())
    return loaded
