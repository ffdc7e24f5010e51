"""A calibration batch: what counts in it, what state the model is in for it, and what it leaves behind.

What is changed for a batch is put back on any exit.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from zssvd_lightning.errors import CalibrationError

IGNORED_LABEL = -100


def token_mask(batch: Any) -> Tensor | None:
    """Which positions (B, T) of a batch are tokens and not padding: its `attention_mask`, or None for all of them."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    return mask.bool()


def loss_terms(batch: Any) -> int:
    """How many terms the mean loss of a batch runs over, which is the weight of its gradient.

    Labels count where they are not -100. Of labels as long as their inputs (B, T) the first column does not count,
    since causal models never predict it and masked ones have a special token there. Without labels it is the number
    of rows of the first tensor.

    Raises:
        CalibrationError: no label counts, or there is no tensor in the batch.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if isinstance(labels, Tensor):
        inputs = batch.get("input_ids")
        shifted = isinstance(inputs, Tensor) and labels.dim() == 2 and labels.shape == inputs.shape
        counted = labels[:, 1:] if shifted else labels
        terms = int((counted != IGNORED_LABEL).sum())
        if terms == 0:
            raise CalibrationError("a calibration batch has no label to predict: all are -100; drop such batches")
        return terms
    tensors = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, Sequence) else [batch]
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.dim() > 0:
            return len(tensor)
    raise CalibrationError(f"cannot tell the size of a calibration batch of type {type(batch).__name__}")


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What a layer was called with, as its hooks are told."""
    X: Tensor = args[0] if args else next(iter(kwargs.values()))
    return X


def rows_that_count(X: Tensor, mask: Tensor | None) -> Tensor:
    """Rows (N, n) of X at positions in `mask` (B, T), where X is (B, T, n) or (B T, n); all rows of other shapes."""
    if mask is not None and X.shape[:-1] in (mask.shape, (mask.numel(),)):
        return X[mask.reshape(X.shape[:-1])]
    return X.reshape(-1, X.shape[-1])
