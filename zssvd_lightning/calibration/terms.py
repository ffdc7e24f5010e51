"""Comparison of the number of loss terms of a batch with its loss: both must add up over parts of the batch."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from zssvd_lightning.calibration.batches import IGNORED_LABEL, loss_terms, tensors_in, token_mask
from zssvd_lightning.distributed import Team

logger = logging.getLogger(__name__)

EXACT = 1e-4
"""Error of the loss, relative to its size, up to which it adds up."""

WRONG = 2e-3
"""Error from which it does not."""

Measure = Callable[[Any], tuple[float, float]]
"""Function that returns the loss of a batch and its number of terms."""


def check_terms(measure: Measure, batches: Sequence[Any], team: Team) -> None:
    """Warn if the loss of a batch is no mean over its terms, as far as parts of a batch tell. Collective.

    The first batch that can be cut by its rows is cut. If there is none, two batches of one row are joined.

    Args:
        measure: function that returns the loss of a batch and its number of terms.
        batches: batches of this process.
        team: the processes of the run.
    """
    batch, parts, joined = _cut(batches)
    fewest = min(team.gathered(len(parts)))
    if not fewest:
        logger.info("the number of loss terms cannot be checked: no calibration batch can be cut by its rows")
        return
    try:
        with team.together():
            found = doubt(measure, batch, parts[:fewest], joined=joined)
    except Exception as error:  # noqa: BLE001  user code that may need whole batches
        logger.info("the number of loss terms cannot be checked on parts of a batch: %s", error)
        return
    if found is not None:
        logger.warning(
            "the loss of a calibration batch is %s as they are counted, so that batches are weighted wrongly; say "
            "how many terms its mean has (terms of compress, loss_terms of the callback), or return a mean",
            found,
        )


def _cut(batches: Sequence[Any]) -> tuple[Any, list[tuple[Any, Any]], bool]:
    """Return a batch, the ways to cut it, and whether it was joined from batches of one row."""
    try:
        for batch in batches:
            if parts := parts_of(batch):
                return batch, parts, False
        return *joined_rows(batches), True
    except Exception as error:  # noqa: BLE001  batches are of any type
        logger.info("calibration batches cannot be cut by their rows: %s", error)
        return None, [], False


def parts_of(batch: Any) -> list[tuple[Any, Any]]:
    """Return ways to cut a batch into two parts by its rows; none if its tensors do not have two rows or more alike."""
    rows = _number_of_rows(batch)
    return [
        (_rows(batch, slice(cut)), _rows(batch, slice(cut, None))) for cut in sorted({rows // 2, 1}) if 0 < cut < rows
    ]


def joined_rows(batches: Sequence[Any]) -> tuple[Any, list[tuple[Any, Any]]]:
    """Return a batch of two rows, joined from two batches of one row, and these two.

    If no two batches have tensors of the same sizes, the first is joined to itself, which still tells a sum from a
    mean. Without a batch of one row there is no way to cut.
    """
    rows = [batch for batch in batches if _number_of_rows(batch) == 1]
    alike = ((one, other) for one, other in combinations(rows, 2) if _sizes(one) == _sizes(other))
    one, other = next(alike, (rows[0], rows[0]) if rows else (None, None))
    if one is None:
        return None, []
    others = (tensor for _, tensor in tensors_in(other))
    return apply_to_collection(one, Tensor, lambda tensor: torch.cat([tensor, next(others)])), [(one, other)]


def doubt(measure: Measure, batch: Any, parts: list[tuple[Any, Any]], *, joined: bool = False) -> str | None:
    """Return what the loss of a batch is instead of a mean over its terms; None if it is one, or cannot be told.

    The loss of the batch and of its parts, each times its number of terms, must add up. If it does not, but does with
    another number of terms, that number is what the loss goes by. Losses that go by no number, such as contrastive
    ones, are not doubted.

    Args:
        measure: function that returns the loss of a batch and its number of terms.
        batch: the batch.
        parts: ways to cut it; see `parts_of`.
        joined: True if the parts are batches themselves, joined for the comparison. They then have together the number
            of terms that they have alone, whatever `measure` counts in a batch that never occurs.
    """
    loss, terms = measure(batch)
    cut = [(one, other, measure(one), measure(other)) for one, other in parts]

    def error(count: Callable[[Any], float] | None) -> float:
        worst, whole = 0.0, terms if count is None else count(batch)
        for one, other, (loss_one, terms_one), (loss_other, terms_other) in cut:
            if count is not None:
                terms_one, terms_other = count(one), count(other)  # noqa: PLW2901
            size = max(abs(loss), abs(loss_one), abs(loss_other)) or 1.0
            if joined and count is None:
                whole = terms_one + terms_other
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


def _number_of_rows(batch: Any) -> int:
    """Return the number of rows of all tensors; 0 if they differ, or if a number may say something of the whole."""
    lengths = {len(tensor) if tensor.dim() else 0 for _, tensor in tensors_in(batch)}
    return lengths.pop() if len(lengths) == 1 and not _has_number(batch) else 0


def _has_number(batch: Any) -> bool:
    """Return True if there is a number beside the tensors of a batch. Parts of the batch may need another one."""
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        return any(map(_has_number, batch))
    return isinstance(batch, int | float) and not isinstance(batch, bool)


def _sizes(batch: Any) -> dict[str, torch.Size]:
    return {path: tensor.shape for path, tensor in tensors_in(batch)}


def _positions(batch: Any) -> float:
    mask = token_mask(batch)
    return 0.0 if mask is None else float(mask.sum())


def _entries(path: str) -> Callable[[Any], float]:
    return lambda batch: float((dict(tensors_in(batch))[path] != IGNORED_LABEL).sum())


def _rows(batch: Any, rows: slice) -> Any:
    return apply_to_collection(batch, Tensor, lambda tensor: tensor[rows])
