"""Comparison of the number of loss terms of a batch with its loss: both must add up over parts of the batch."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from zssvd_lightning.calibration.batches import IGNORED_LABEL, loss_terms, tensors_in, token_mask

EXACT = 1e-4
"""Error of the loss, relative to its size, up to which it adds up."""

WRONG = 2e-3
"""Error from which it does not."""

Measure = Callable[[Any], tuple[float, float]]
"""Function that returns the loss of a batch and its number of terms."""


def parts_of(batch: Any) -> list[tuple[Any, Any]]:
    """Return ways to cut a batch into two parts by its rows; none if its tensors do not have two rows or more alike."""
    lengths = {len(tensor) if tensor.dim() else 0 for _, tensor in tensors_in(batch)}
    rows = lengths.pop() if len(lengths) == 1 else 0
    return [
        (_rows(batch, slice(cut)), _rows(batch, slice(cut, None))) for cut in sorted({rows // 2, 1}) if 0 < cut < rows
    ]


def doubt(measure: Measure, batch: Any, parts: list[tuple[Any, Any]]) -> str | None:
    """Return what the loss of a batch is instead of a mean over its terms; None if it is one, or cannot be told.

    The loss of the batch and of its parts, each times its number of terms, must add up. If it does not, but does with
    another number of terms, that number is what the loss goes by. Losses that go by no number, such as contrastive
    ones, are not doubted.

    Args:
        measure: function that returns the loss of a batch and its number of terms.
        batch: the batch.
        parts: ways to cut it; see `parts_of`.
    """
    loss, terms = measure(batch)
    cut = [(one, other, measure(one), measure(other)) for one, other in parts]

    def error(count: Callable[[Any], float] | None) -> float:
        worst, whole = 0.0, terms if count is None else count(batch)
        for one, other, (loss_one, terms_one), (loss_other, terms_other) in cut:
            if count is not None:
                terms_one, terms_other = count(one), count(other)  # noqa: PLW2901
            size = max(abs(loss), abs(loss_one), abs(loss_other)) or 1.0
            found = abs(loss - (loss_one * terms_one + loss_other * terms_other) / whole) / size
            worst = found if math.isnan(found) else max(worst, found)
        return worst

    if not cut or not error(None) > WRONG:
        return None
    return next((name for name, count in _counts(batch) if error(count) < EXACT), None)


def _counts(batch: Any) -> Iterator[tuple[str, Callable[[Any], float]]]:
    """Yield the numbers that a loss may go by: what it is then, and the function that counts."""
    yield "a sum over its terms, not a mean", lambda batch: 1.0
    yield "a mean over its rows, not over its terms", lambda batch: float(len(next(tensors_in(batch))[1]))
    if token_mask(batch) is not None:
        yield "a mean over its positions that are not padding, not over its terms", _positions
    if isinstance(batch, Mapping) and "labels" in batch:
        yield "a mean over its labels but the first of each row, not over its terms", loss_terms
        yield "a mean over its labels, not over its terms", lambda batch: loss_terms(batch, shifts=False)
    for path, tensor in tensors_in(batch):
        if tensor.dim() > 1 and not tensor.is_floating_point():
            yield f"a mean over the entries of {path} that are not {IGNORED_LABEL}, not over its terms", _entries(path)


def _positions(batch: Any) -> float:
    mask = token_mask(batch)
    return 0.0 if mask is None else float(mask.sum())


def _entries(path: str) -> Callable[[Any], float]:
    return lambda batch: float((dict(tensors_in(batch))[path] != IGNORED_LABEL).sum())


def _rows(batch: Any, rows: slice) -> Any:
    return apply_to_collection(batch, Tensor, lambda tensor: tensor[rows])
