"""Observation of one training batch."""

from contextlib import AbstractContextManager, ExitStack
from typing import TypeVar

from torch import Tensor

from zssvd_lightning._contexts import uncompiled
from zssvd_lightning.calibration.hooks import Observation
from zssvd_lightning.compression.engine import Compression
from zssvd_lightning.compression.phase import Phase

Entered = TypeVar("Entered")


class ObservedBatch:
    """Training batch that is observed from its first to its last hook.

    Attributes:
        terms: number of terms in the mean loss.
        observation: observation of the model; see `calibration.hooks.observing`.
        complete: True once the loss and the gradients were computed.
        stepped: True if the batch ended an accumulation window.
    """

    def __init__(self, compression: Compression, phase: Phase, terms: float, mask: Tensor | None) -> None:
        self.terms = terms
        self.complete = False
        self.stepped = False
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

    def close(self) -> None:
        """Restore training mode, flags and cache setting, and remove the hooks."""
        self._stack.close()
