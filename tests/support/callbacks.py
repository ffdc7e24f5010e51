"""Callbacks that several tests put into their Trainers."""

from dataclasses import fields
from typing import Any

import lightning as L

from zssvd_lightning import Phase, Schedule, ZSSVDCallback


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
