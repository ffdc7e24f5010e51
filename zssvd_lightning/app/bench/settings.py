"""Settings of a measurement, and the workloads that they ask for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from zssvd_lightning._numerics import DTYPES
from zssvd_lightning._validation import require, require_count, require_one_of
from zssvd_lightning.errors import ConfigError

CONTEXTS = (128, 2048)
"""Contexts that are measured if none are given, up to the maximum length of the model."""


class Workload(NamedTuple):
    """Prefill of `batch` rows of `context` tokens, then `tokens` decode steps on its cache."""

    batch: int
    context: int
    """Tokens of each row. 0 for models of images, whose inputs have one size."""
    tokens: int


@dataclass(frozen=True)
class BenchSettings:
    """Settings of a measurement.

    Raises:
        ConfigError: a setting is out of range.
    """

    batches: tuple[int, ...] = (1, 8, 32)
    """Numbers of rows."""
    contexts: tuple[int, ...] | None = None
    """Numbers of tokens before the first decode step. None for those of `CONTEXTS` that the model takes."""
    tokens: int = 16
    """Decode steps in a round."""
    repeats: int = 5
    """Rounds."""
    seconds: float | None = None
    """Seconds after which a workload gets no further round; the first is always finished. None for no limit."""
    dtype: str = "float32"
    """Floating-point type of the weights."""
    device: str = "cpu"
    """`cpu`, `cuda` or `cuda:N`."""
    compiled: bool = False
    """True to run what `torch.compile` makes of the models."""

    def __post_init__(self) -> None:
        for name, values in (("batch", self.batches), ("context", self.contexts or CONTEXTS)):
            require(len(values) > 0, name, values, "one or more numbers")
            for value in values:
                require_count(name, value, 1)
        require_count("tokens", self.tokens, 1)
        require_count("repeats", self.repeats, 1)
        require(self.seconds is None or self.seconds > 0, "seconds", self.seconds, "above 0")
        require_one_of("dtype", self.dtype, DTYPES)
        kind = self.device.partition(":")[0]
        require(kind in {"cpu", "cuda"}, "device", self.device, "cpu, cuda or cuda:N")


def numbers(option: str, given: str) -> tuple[int, ...]:
    """Return the whole numbers of an option such as `1,8,32`, each once, in their order. Raises ConfigError."""
    try:
        return tuple(dict.fromkeys(int(part) for part in given.split(",")))
    except ValueError as error:
        raise ConfigError(f"--{option} is {given!r}, but must be whole numbers, such as 1,8") from error


def fractions(option: str, given: str) -> tuple[float, ...]:
    """Return the numbers of an option such as `0.2,0.4`, each once, in their order. Raises ConfigError."""
    try:
        return tuple(dict.fromkeys(float(part) for part in given.split(",")))
    except ValueError as error:
        raise ConfigError(f"--{option} is {given!r}, but must be numbers, such as 0.2,0.4") from error


def workloads(settings: BenchSettings, limit: int | None, *, decodes: bool, images: bool) -> tuple[list[Workload], str]:
    """Return the workloads, and a note about contexts that are left out, which is empty if there are none.

    Args:
        settings: what to measure.
        limit: largest number of tokens of the model; None if there is none.
        decodes: False if the models are measured in prefill alone.
        images: True if inputs are images, which have no context.

    Raises:
        ConfigError: contexts were given, and one with its decode steps is longer than the model takes; or no context
            of `CONTEXTS` fits.
    """
    tokens = settings.tokens if decodes else 0
    if images:
        return [Workload(batch, 0, 0) for batch in settings.batches], ""
    asked = settings.contexts or CONTEXTS
    long = [context for context in asked if limit is not None and context + tokens > limit]
    fitting = [context for context in asked if context not in long]
    note = ""
    if long:
        and_steps = f" and {tokens} decode steps" if tokens else ""
        note = (
            f"context {_listed(long)}{and_steps} are more than the {limit} tokens that the model takes (by its config)"
        )
        if settings.contexts is not None or not fitting:
            raise ConfigError(f"{note}; shorten them with --context and --tokens")
    return [Workload(batch, context, tokens) for context in fitting for batch in settings.batches], note


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))
