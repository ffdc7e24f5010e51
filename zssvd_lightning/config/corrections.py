"""Steps between two truncations that lower the loss of the truncated weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from zssvd_lightning._registry import Registry


@dataclass(frozen=True)
class Correction:
    """Step that changes truncated weights in place."""

    step: str | Callable[[Any], None]
    """Function that is called with the `Compression`. For steps of this package, the value of an `Act`."""
    truncates: bool = False
    """True if the step ends with its own truncation. Otherwise a truncation follows it."""
    needs_loss_metric: bool = False
    """True if the step is taken in the coordinates of a metric that measures the loss (`Metric.measures_loss`)."""
    refits: bool = False
    """True if the step keeps the ranks and runs the last batches again."""
    searches: bool = False
    """True if `line_search` may shorten the step."""
    splits_by_rows: bool = False
    """True if the step also works when each process holds some rows of every weight, as under FSDP2."""


def _wrong(name: str, entry: Any) -> str | None:
    fits = isinstance(entry, Correction) and callable(entry.step)
    return None if fits else "an instance of Correction whose step is a function"


CORRECTIONS: Registry[Correction] = Registry(
    "correction_step",
    "zssvd_lightning.corrections",
    {
        "projected": Correction("correct", searches=True, splits_by_rows=True),
        "natural": Correction("descend", truncates=True, needs_loss_metric=True, splits_by_rows=True),
        "refit": Correction("refit", truncates=True, refits=True),
    },
    _wrong,
)
"""Correction steps by name; `register` adds one."""
