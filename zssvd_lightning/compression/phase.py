"""The phases of a compression inside a training run.

WAIT -> CALIBRATE -> TRUNCATE -> (CORRECT -> CALIBRATE -> TRUNCATE) x corrections -> FACTORIZE -> RECOVER -> DONE
"""

import warnings
from collections.abc import Mapping
from enum import EnumType, StrEnum
from typing import Any, Self


class _WithOldName(EnumType):
    """Answer to the British spelling of `FACTORIZE`, with a warning."""

    def __getattr__(cls, name: str) -> Any:
        if name == "FACTORISE":
            warnings.warn("Phase.FACTORISE is now Phase.FACTORIZE", DeprecationWarning, stacklevel=2)
            return cls["FACTORIZE"]
        raise AttributeError(name)


class Phase(StrEnum, metaclass=_WithOldName):
    """Where the compression stands."""

    WAIT = "wait"
    """Ordinary training, until the set point."""
    CALIBRATE = "calibrate"
    """Batches give statistics and change no weight."""
    TRUNCATE = "truncate"
    """Between two batches: components are chosen and dropped, in place."""
    CORRECT = "correct"
    """Batches give gradients: of a step, or along components."""
    FACTORIZE = "factorize"
    """Between two batches: low-rank layers go in, and optimizers are set up again."""
    RECOVER = "recover"
    """Ordinary training of the factors."""
    DONE = "done"
    """The fit has ended."""

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        """Read the British spelling, as checkpoints of version 0.1 have it."""
        return cls("factorize") if value == "factorise" else None


GATHERING = (Phase.CALIBRATE, Phase.CORRECT)


def phase_is_after(state: Mapping[str, Any]) -> bool:
    """Whether the model of a state is low-rank."""
    return Phase(state["phase"]) in (Phase.RECOVER, Phase.DONE)
