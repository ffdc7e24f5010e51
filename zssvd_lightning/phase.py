"""The phases of a compression inside a training run.

WAIT -> CALIBRATE -> TRUNCATE -> (CORRECT -> CALIBRATE -> TRUNCATE) x corrections -> FACTORISE -> RECOVER -> DONE
"""

from enum import StrEnum


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
