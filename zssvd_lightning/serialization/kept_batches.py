"""Number of calibration batches to keep back, and their form in checkpoints."""

from typing import Any

from torch import Tensor
from transformers import BatchEncoding

KEPT_BACK = 8
"""Number of batches per process to keep back, if there are four times as many; a quarter of them otherwise."""


MOST_BYTES = 64 * 2**20
"""Largest size of the batches of a process that a checkpoint stores. A resumed run cannot compare without them."""


ENCODED = "BatchEncoding"
"""Key under which a checkpoint stores a batch of transformers' type of that name, which it cannot hold itself."""


def number_to_keep_back(batches: float) -> int:
    """Return how many of the calibration batches to keep back.

    Example:
        >>> [number_to_keep_back(batches) for batches in (1, 4, 16, 1000)]
        [1, 1, 4, 8]
    """
    return int(max(1, min(KEPT_BACK, batches // 4)))


def batches_to_save(batches: list[Any]) -> list[Any] | None:
    """Return batches as plain types for a checkpoint; None if they are too large or of other types."""
    plain = [{ENCODED: dict(batch)} if isinstance(batch, BatchEncoding) else batch for batch in batches]
    return plain if all(map(_is_plain, plain)) and sum(map(_bytes_of, plain)) <= MOST_BYTES else None


def batches_of_saved(saved: list[Any]) -> list[Any]:
    """Return the batches that `batches_to_save` made plain."""
    return [
        BatchEncoding(batch[ENCODED]) if isinstance(batch, dict) and set(batch) == {ENCODED} else batch
        for batch in saved
    ]


def _is_plain(value: Any) -> bool:
    """Return True for nested lists, tuples and dictionaries of tensors, numbers and strings, which checkpoints hold."""
    if type(value) is dict:
        return all(map(_is_plain, [*value.keys(), *value.values()]))
    if type(value) in {list, tuple}:
        return all(map(_is_plain, value))
    return value is None or type(value) in {Tensor, bool, int, float, str}


def _bytes_of(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(map(_bytes_of, parts))
