"""The phases of a compression inside a training run.

WAIT -> CALIBRATE -> TRUNCATE -> (CORRECT -> CALIBRATE -> TRUNCATE) x corrections -> FACTORISE -> RECOVER -> DONE
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any


class Phase(StrEnum):
    """Where the compression stands."""

    WAIT = "wait"
    """Ordinary training, until the set point."""
    CALIBRATE = "calibrate"
    """Batches give statistics and change no weight."""
    TRUNCATE = "truncate"
    """Between two batches: components are chosen and dropped, in place."""
    CORRECT = "correct"
    """Batches give gradients: of a step, or along components."""
    FACTORISE = "factorise"
    """Between two batches: low-rank layers go in, and optimizers are set up again."""
    RECOVER = "recover"
    """Ordinary training of the factors."""
    DONE = "done"
    """The fit has ended."""


GATHERING = (Phase.CALIBRATE, Phase.CORRECT)


def phase_is_after(state: Mapping[str, Any]) -> bool:
    """Whether the model of a state is low-rank."""
    return Phase(state["phase"]) in (Phase.RECOVER, Phase.DONE)
