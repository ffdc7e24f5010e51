"""The course of a compression: what is gathered, and what is then done, one after the other."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from zssvd_lightning.compression.engine import Compression
from zssvd_lightning.compression.phase import Phase
from zssvd_lightning.config.compression import CompressionConfig

Act = Callable[[Compression], None]


class Step(NamedTuple):
    """Statistics over some batches, and what is done with them."""

    gathers: Phase
    """CALIBRATE (second moments and gradients) or CORRECT (gradients)."""
    acts: tuple[Act, ...]

    @property
    def truncates(self) -> bool:
        """Whether the model is truncated when it is over."""
        return self.acts[-1] in (Compression.truncate, Compression.descend, Compression.refit)


def steps(config: CompressionConfig) -> list[Step]:
    """The course of a compression, up to its factorization: a truncation, and rounds that end in another."""
    truncation = Step(Phase.CALIBRATE, (Compression.truncate,))
    first = [truncation]
    if config.reestimate:
        first = [Step(Phase.CALIBRATE, (Compression.decompose,)), Step(Phase.CORRECT, (Compression.truncate,))]
    rounds = max(config.corrections, config.truncations - 1)
    corrected = _correction(config, truncation)
    return first + corrected * config.corrections + [truncation] * (rounds - config.corrections)


def to_first_truncation(course: Sequence[Step]) -> Sequence[Step]:
    """The first steps, up to one that truncates."""
    return course[: [step.truncates for step in course].index(True) + 1]


def _correction(config: CompressionConfig, truncation: Step) -> list[Step]:
    if config.correction_step != "projected":
        act = Compression.descend if config.correction_step == "natural" else Compression.refit
        return [Step(Phase.CALIBRATE if config.fresh_moments else Phase.CORRECT, (act,))]
    course = [Step(Phase.CORRECT, (Compression.correct,))]
    if config.line_search:
        course.append(Step(Phase.CORRECT, (Compression.shorten_step,)))
    if config.fresh_moments:
        return [*course, truncation]
    return [*course[:-1], Step(Phase.CORRECT, (*course[-1].acts, Compression.truncate))]
