"""Callbacks that several tests put into their Trainers."""

from typing import Any

from zssvd_lightning import Phase, ZSSVDCallback


def short(**settings: Any) -> ZSSVDCallback:
    """A compression of few batches."""
    return ZSSVDCallback(**({"prune_ratio": 0.3, "correction_batches": 2, "progress": False} | settings))


class Keeps(ZSSVDCallback):
    """Keeps the statistics of the first calibration."""

    kept = None

    def on_before_backward(self, trainer, pl_module, loss):
        if self.phase is Phase.CALIBRATE:
            self.kept = self.kept or self._lifecycle.compression.gathering.moments
        super().on_before_backward(trainer, pl_module, loss)
