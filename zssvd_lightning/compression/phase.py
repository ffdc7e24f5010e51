"""Phases of a compression inside a training run.

WAIT -> CALIBRATE -> TRUNCATE -> (CORRECT -> TRUNCATE) x corrections -> FACTORIZE -> RECOVER -> DONE

With `fresh_moments`, a CALIBRATE comes before each TRUNCATE.
"""

import warnings
from collections.abc import Mapping
from enum import EnumType, StrEnum
from typing import Any, Self


class _WithOldName(EnumType):
    """Metaclass that accepts the British spelling of `FACTORIZE`, with a warning."""

    def __getattr__(cls, name: str) -> Any:
        if name == "FACTORISE":
            warnings.warn("Phase.FACTORISE is now Phase.FACTORIZE", DeprecationWarning, stacklevel=2)
            return cls["FACTORIZE"]
        raise AttributeError(name)


class Phase(StrEnum, metaclass=_WithOldName):
    """Phase of a compression."""

    WAIT = "wait"
    """Ordinary training until compression starts."""
    CALIBRATE = "calibrate"
    """Batches are used for statistics only; no weight changes."""
    TRUNCATE = "truncate"
    """Between two batches, components are selected and dropped in place."""
    CORRECT = "correct"
    """Batches are used for gradients only: those of a step, or the curvature along components."""
    FACTORIZE = "factorize"
    """Between two batches, layers are replaced by low-rank ones and optimizers are set up again."""
    RECOVER = "recover"
    """Ordinary training of the factors."""
    DONE = "done"
    """The fit has ended."""

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        """Accept the British spelling, which checkpoints of version 0.1 contain."""
        return cls("factorize") if value == "factorise" else None


GATHERING = (Phase.CALIBRATE, Phase.CORRECT)


def phase_is_after(state: Mapping[str, Any]) -> bool:
    """Return True if the model that belongs to a saved state is low-rank."""
    return Phase(state["phase"]) in (Phase.RECOVER, Phase.DONE)
