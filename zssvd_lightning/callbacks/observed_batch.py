"""Observation of one training batch."""

from contextlib import AbstractContextManager, ExitStack
from typing import Any, NoReturn, TypeVar

from zssvd_lightning._contexts import uncompiled
from zssvd_lightning.calibration.hooks import Observation
from zssvd_lightning.calibration.masks import TokenMask
from zssvd_lightning.callbacks.trainer.replay import copied
from zssvd_lightning.compression.engine import Compression
from zssvd_lightning.compression.phase import Phase
from zssvd_lightning.compression.safeguard import Safeguard
from zssvd_lightning.errors import CalibrationError

Entered = TypeVar("Entered")


class ObservedBatch:
    """Training batch that is observed from its first to its last hook.

    Attributes:
        terms: number of terms in the mean loss.
        observation: observation of the model; see `calibration.hooks.observing`.
        complete: True once the loss and the gradients were computed.
        stepped: True if the batch ended an accumulation window.
        kept_back: copy of the batch to keep back; None if enough are.
    """

    def __init__(self, compression: Compression, phase: Phase, terms: float, mask: TokenMask) -> None:
        self.terms = terms
        self._compression = compression
        self.complete = False
        self.stepped = False
        self.kept_back: Any = None
        with ExitStack() as stack:
            stack.enter_context(compression.stopwatch(phase.value))
            stack.enter_context(uncompiled())
            self.observation: Observation = stack.enter_context(
                compression.gathering.observing(mask, inputs=phase is Phase.CALIBRATE)
            )
            self._stack = stack.pop_all()

    def during(self, context: AbstractContextManager[Entered]) -> Entered:
        """Enter a context manager until the observation ends, and return its value."""
        return self._stack.enter_context(context)

    def keep(self, batch: Any) -> None:
        """Copy the batch before anything changes it; give up keeping batches back if it cannot be copied."""
        try:
            self.kept_back = copied(batch)
        except Exception as error:  # noqa: BLE001  batches are of any type
            if (safeguard := self._compression.safeguard) is not None:
                safeguard.give_up(f"{type(error).__name__}: {error}")

    def keep_back(self, safeguard: Safeguard | None) -> None:
        """Hand the copy to the safeguard, once the batch is complete."""
        if safeguard is not None and self.kept_back is not None:
            safeguard.batches.append(self.kept_back)
            self.kept_back = None

    def refuse_incomplete(self, name: str) -> None:
        """Raise CalibrationError if the batch called `name` has ended without a loss."""
        if not self.complete:
            raise CalibrationError(f"training_step gave no loss for {name}; calibrate on batches that give one")

    def close(self) -> None:
        """Restore training mode, flags and cache setting, and remove the hooks."""
        self._stack.close()


def refuse_none(index: int, epoch: int) -> NoReturn:
    """Raise CalibrationError for a batch that is None."""
    raise CalibrationError(
        f"batch {index} of epoch {epoch} is None, which Lightning does not run, so that it cannot be calibrated on; "
        "have the DataLoader leave such batches out"
    )
