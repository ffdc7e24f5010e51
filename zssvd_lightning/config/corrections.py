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
    splits_by_rows: bool = False
    """True if the step also works when each process holds some rows of every weight, as under FSDP2."""
    refits: bool = False
    """True if the step keeps the ranks and runs the last batches again. Only for steps of this package."""
    searches: bool = False
    """True if `line_search` may shorten the step. Only for steps of this package."""


def _wrong(name: str, entry: Any) -> str | None:
    if not isinstance(entry, Correction) or not callable(entry.step):
        return "an instance of Correction whose step is a function"
    return (
        "a Correction without `refits` and `searches`, which are for steps of this package"
        if (entry.refits or entry.searches)
        else None
    )


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
