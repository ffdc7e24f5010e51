"""One training batch under observation."""

from contextlib import AbstractContextManager, ExitStack
from typing import TypeVar

from torch import Tensor

from zssvd_lightning._contexts import uncompiled
from zssvd_lightning.calibration.hooks import Observation
from zssvd_lightning.compression.engine import Compression
from zssvd_lightning.compression.phase import Phase

Entered = TypeVar("Entered")


class ObservedBatch:
    """A training batch between its first and its last hook.

    Attributes:
        terms: how many terms its mean loss runs over.
        observation: see `observation.observing`.
        complete: whether its loss and its gradients have come.
        stepped: whether it closed an accumulation window.
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
        """Enters a context that ends with the observation."""
        return self._stack.enter_context(context)

    def close(self) -> None:
        """Puts mode, flags, cache and hooks back."""
        self._stack.close()
