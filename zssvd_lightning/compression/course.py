"""Sequence of stages of a compression. Each stage gathers statistics and then acts on the weights."""

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

from zssvd_lightning.compression.phase import Phase
from zssvd_lightning.config.compression import CompressionConfig


class Act(StrEnum):
    """Operation between two batches: a method of `Compression`, or a key of `corrections.STEPS`."""

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
    acts: tuple[Act | Callable[[Any], None], ...]
    """Acts, and steps of registered corrections, which are called with the `Compression`."""
    truncates: bool = True
    """True if the model is truncated at the end of the stage."""
    corrects: bool = False
    """True if the stage begins with a correction."""

    @property
    def decomposes(self) -> bool:
        """True if the stage decomposes all layers by the statistics that it gathers, at the weights that gave them."""
        return self.gathers is Phase.CALIBRATE and self.acts[:1] in ((Act.DECOMPOSE,), (Act.TRUNCATE,))


def course(config: CompressionConfig) -> list[Stage]:
    """Return the stages before factorization: a truncation, then rounds that each end in another truncation."""
    truncation = Stage(Phase.CALIBRATE, (Act.TRUNCATE,))
    first = [truncation]
    if config.reestimate:
        first = [Stage(Phase.CALIBRATE, (Act.DECOMPOSE,), truncates=False), Stage(Phase.CORRECT, (Act.TRUNCATE,))]
    rounds = max(config.corrections, config.truncations - 1)
    corrected = _correction(config, truncation)
    return first + corrected * config.corrections + [truncation] * (rounds - config.corrections)


def to_first_truncation(stages: Sequence[Stage]) -> Sequence[Stage]:
    """Return the stages up to and including the first one that truncates."""
    return stages[: [stage.truncates for stage in stages].index(True) + 1]


def _correction(config: CompressionConfig, truncation: Stage) -> list[Stage]:
    correction = config.correction
    step = Act(correction.step) if isinstance(correction.step, str) else correction.step
    if correction.truncates:
        return [Stage(Phase.CALIBRATE if config.fresh_moments else Phase.CORRECT, (step,), corrects=True)]
    stages = [Stage(Phase.CORRECT, (step,), truncates=False, corrects=True)]
    if correction.searches and config.line_search:
        stages.append(Stage(Phase.CORRECT, (Act.SHORTEN_STEP,), truncates=False))
    if config.fresh_moments:
        return [*stages, truncation]
    *before, last = stages
    return [*before, last._replace(acts=(*last.acts, Act.TRUNCATE), truncates=True)]
