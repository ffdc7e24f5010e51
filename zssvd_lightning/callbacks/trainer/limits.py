"""The limits of a training run, raised by what a compression takes of it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning as L


@dataclass
class ExtendedLimits:
    """Steps and epochs on top of `max_steps` and `max_epochs`; limits that are not set stay so."""

    steps: int = 0
    """Optimizer steps taken by calibration and corrections."""
    batches: int = 0
    """Their batches."""
    epochs: int = 0
    """Whole epochs that hold as many batches."""
    _granted: tuple[int, int] = (0, 0)
    """Steps and epochs the Trainer has been given so far."""

    def add(self, trainer: L.Trainer, stepped: bool, batches_per_epoch: float) -> None:
        """Counts a batch, and raises the limits by it."""
        self.batches += 1
        self.steps += stepped
        self.recount(trainer, batches_per_epoch)

    def recount(self, trainer: L.Trainer, batches_per_epoch: float) -> None:
        """Raises the limits, once it is known how long an epoch is."""
        self.epochs = 0 if math.isinf(batches_per_epoch) else math.ceil(self.batches / batches_per_epoch)
        self.grant(trainer)

    def grant(self, trainer: L.Trainer) -> None:
        """Raises the Trainer's limits to what they were, and this on top."""
        self._raise(trainer, self.steps - self._granted[0], self.epochs - self._granted[1])
        self._granted = (self.steps, self.epochs)

    def take_back(self, trainer: L.Trainer) -> None:
        """Gives the Trainer its own limits again."""
        self._raise(trainer, -self._granted[0], -self._granted[1])
        self._granted = (0, 0)

    def state_dict(self, one_more: bool = False, stepped: bool = False) -> dict[str, Any]:
        """The counts, with `one_more` batch that is over but not added yet."""
        return {"steps": self.steps + (one_more and stepped), "batches": self.batches + one_more, "epochs": self.epochs}

    @staticmethod
    def _raise(trainer: L.Trainer, steps: int, epochs: int) -> None:
        if trainer.max_steps != -1:
            trainer.fit_loop.epoch_loop.max_steps += steps
        if trainer.max_epochs is not None and trainer.max_epochs != -1:
            trainer.fit_loop.max_epochs = trainer.max_epochs + epochs


@contextmanager
def stopping_now(trainer: L.Trainer) -> Iterator[None]:
    """Has the training end after this batch, whatever `min_epochs` and `min_steps`, which are back after the block."""
    loop = trainer.fit_loop
    before = loop.min_epochs, loop.epoch_loop.min_steps
    loop.min_epochs, loop.epoch_loop.min_steps = None, None
    trainer.should_stop = True
    try:
        yield
    finally:
        loop.min_epochs, loop.epoch_loop.min_steps = before


def batch_is_over(trainer: L.Trainer) -> bool:
    """Whether Lightning would not run the latest batch again, were it to go on from a checkpoint saved now."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return bool(progress.processed == progress.ready)


def batches_run(trainer: L.Trainer) -> int:
    """Batches of the epoch that ran or are running: not those skipped by an `on_train_batch_start` that returned -1."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return int(progress.started)


def scheduled_steps(trainer: L.Trainer) -> float:
    """How many optimizer steps a learning-rate schedule made now will see: ask it in `configure_optimizers`.

    That is all the training at first, and the recovery when `configure_optimizers` runs again after factorization, or
    in a run that was resumed from there.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    begun = [start for callback in callbacks if (start := getattr(callback, "recovers_from", None)) is not None]
    return trainer.estimated_stepping_batches - max(begun, default=0)
