"""Sequence of stages of a compression. Each stage gathers statistics and then acts on the weights."""

from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

from zssvd_lightning.compression.phase import Phase
from zssvd_lightning.config.compression import CompressionConfig


class Act(StrEnum):
    """Operation between two batches. The value is the name of a method of `Compression`."""

    DECOMPOSE = "decompose"
    """Computation of the spectra, along whose components the curvature is measured next."""
    TRUNCATE = "truncate"
    """Decomposition, selection and truncation."""
    CORRECT = "correct"
    """Projected gradient step (arXiv 2602.02848)."""
    SHORTEN_STEP = "shorten_step"
    """Move back along that step to the estimated minimum of the loss."""
    DESCEND = "descend"
    """Natural gradient step, followed by truncation."""
    REFIT = "refit"
    """Closed-form fit of the truncated weights to the outputs of the dense layers."""


class Stage(NamedTuple):
    """Phase of gathering statistics, and the acts that follow it."""

    gathers: Phase
    """CALIBRATE (second moments and gradients) or CORRECT (gradients only)."""
    acts: tuple[Act, ...]

    @property
    def truncates(self) -> bool:
        """True if the model is truncated at the end of the stage."""
        return self.acts[-1] in (Act.TRUNCATE, Act.DESCEND, Act.REFIT)


def course(config: CompressionConfig) -> list[Stage]:
    """Return the stages before factorization: a truncation, then rounds that each end in another truncation."""
    truncation = Stage(Phase.CALIBRATE, (Act.TRUNCATE,))
    first = [truncation]
    if config.reestimate:
        first = [Stage(Phase.CALIBRATE, (Act.DECOMPOSE,)), Stage(Phase.CORRECT, (Act.TRUNCATE,))]
    rounds = max(config.corrections, config.truncations - 1)
    corrected = _correction(config, truncation)
    return first + corrected * config.corrections + [truncation] * (rounds - config.corrections)


def to_first_truncation(stages: Sequence[Stage]) -> Sequence[Stage]:
    """Return the stages up to and including the first one that truncates."""
    return stages[: [stage.truncates for stage in stages].index(True) + 1]


def _correction(config: CompressionConfig, truncation: Stage) -> list[Stage]:
    if config.correction_step != "projected":
        act = Act.DESCEND if config.correction_step == "natural" else Act.REFIT
        return [Stage(Phase.CALIBRATE if config.fresh_moments else Phase.CORRECT, (act,))]
    stages = [Stage(Phase.CORRECT, (Act.CORRECT,))]
    if config.line_search:
        stages.append(Stage(Phase.CORRECT, (Act.SHORTEN_STEP,)))
    if config.fresh_moments:
        return [*stages, truncation]
    return [*stages[:-1], Stage(Phase.CORRECT, (*stages[-1].acts, Act.TRUNCATE))]
