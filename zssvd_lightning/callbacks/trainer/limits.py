"""Limits of a training run, raised by the batches that a compression uses."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning as L

from zssvd_lightning.callbacks.schedule import ScheduledCompression
from zssvd_lightning.callbacks.trainer.guards import first_step


@dataclass
class ExtendedLimits:
    """Additional steps and epochs beyond `max_steps` and `max_epochs`. Limits that are not set stay unset."""

    steps: int = 0
    """Number of optimizer steps used by calibration and corrections."""
    batches: int = 0
    """Number of batches used by calibration and corrections."""
    epochs: int = 0
    """Number of whole epochs needed for these batches."""
    _granted: tuple[int, int] = (0, 0)
    """Steps and epochs already added to the Trainer's limits."""

    def add(self, trainer: L.Trainer, stepped: bool, batches_per_epoch: float) -> None:
        """Count a batch, and raise the limits accordingly."""
        self.batches += 1
        self.steps += stepped
        self.recount(trainer, batches_per_epoch)

    def recount(self, trainer: L.Trainer, batches_per_epoch: float) -> None:
        """Raise the limits for the given length of an epoch."""
        self.epochs = 0 if math.isinf(batches_per_epoch) else math.ceil(self.batches / batches_per_epoch)
        self.grant(trainer)

    def grant(self, trainer: L.Trainer) -> None:
        """Raise the Trainer's limits to its original limits plus these steps and epochs."""
        self._raise(trainer, self.steps - self._granted[0], self.epochs - self._granted[1])
        self._granted = (self.steps, self.epochs)

    def take_back(self, trainer: L.Trainer) -> None:
        """Restore the Trainer's original limits."""
        self._raise(trainer, -self._granted[0], -self._granted[1])
        self._granted = (0, 0)

    def state_dict(self, one_more: bool = False, stepped: bool = False) -> dict[str, Any]:
        """Return the counts, including a finished batch that is not added yet if `one_more`; `stepped` as in `add`."""
        return {"steps": self.steps + (one_more and stepped), "batches": self.batches + one_more, "epochs": self.epochs}

    @staticmethod
    def _raise(trainer: L.Trainer, steps: int, epochs: int) -> None:
        if trainer.max_steps != -1:
            trainer.fit_loop.epoch_loop.max_steps += steps
        if trainer.max_epochs is not None and trainer.max_epochs != -1:
            trainer.fit_loop.max_epochs = trainer.max_epochs + epochs


@contextmanager
def stopping_now(trainer: L.Trainer) -> Iterator[None]:
    """Stop the training after this batch, ignoring `min_epochs` and `min_steps`, which are restored on exit."""
    loop = trainer.fit_loop
    before = loop.min_epochs, loop.epoch_loop.min_steps
    loop.min_epochs, loop.epoch_loop.min_steps = None, None
    trainer.should_stop = True
    try:
        yield
    finally:
        loop.min_epochs, loop.epoch_loop.min_steps = before


def batch_is_over(trainer: L.Trainer) -> bool:
    """Return True if Lightning would not repeat the latest batch after resuming from a checkpoint saved now."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return bool(progress.processed == progress.ready)


def batches_run(trainer: L.Trainer) -> int:
    """Return the started batches of the epoch, without those skipped because `on_train_batch_start` returned -1."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return int(progress.started)


def scheduled_steps(trainer: L.Trainer) -> float:
    """Return the number of optimizer steps for a learning-rate schedule; call it in `configure_optimizers`.

    Before factorization this is the whole training. When `configure_optimizers` runs again after factorization, or in a
    run resumed from there, it is the recovery, which ends where the next compression of the Trainer starts, if there is
    one. It is infinite if the limits of the Trainer do not determine it.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    begun = [start for callback in callbacks if (start := getattr(callback, "recovers_from", None)) is not None]
    total = trainer.estimated_stepping_batches
    start, end = max(begun, default=0), math.inf if total == -1 else total  # -1: only max_epochs, of unknown length
    for callback in callbacks:
        if begun and isinstance(callback, ScheduledCompression) and getattr(callback, "recovers_from", None) is None:
            end = min(end, max(first_step(trainer, callback.schedule), start + 1))
    return end - start


def end_is_unknown(trainer: L.Trainer) -> bool:
    """Return True if the limits do not determine the number of optimizer steps; call it once the data is loaded."""
    endless = trainer.max_epochs in (None, -1) or math.isinf(trainer.num_training_batches)
    return trainer.max_steps == -1 and endless


def trains_on(trainer: L.Trainer) -> bool:
    """Return True if training batches follow the present one in this fit, as far as its limits tell."""
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        return False
    last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= trainer.max_epochs
    return not (last_epoch and trainer.is_last_batch)
