"""Calibration batches: their tokens, the number of their loss terms, and the rows that count."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from zssvd_lightning.errors import CalibrationError

IGNORED_LABEL = -100


def token_mask(batch: Any) -> Tensor | None:
    """Return the mask (B, T) of the positions that are not padding, from `attention_mask`; None for all positions."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    return mask.bool()


def loss_terms(batch: Any) -> int:
    """Return the number of terms in the mean loss of a batch, which is the weight of its gradient.

    Labels count where they are not -100. If labels have the shape (B, T) of their inputs, the first column does not
    count: causal models never predict it, and masked models have a special token there. Without labels, the number is
    that of the rows of the first tensor.

    Raises:
        CalibrationError: no label counts, or the batch has no tensor.
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
    """Return the input of a layer from the arguments that its hooks receive."""
    X: Tensor = args[0] if args else next(iter(kwargs.values()))
    return X


def rows_that_count(X: Tensor, mask: Tensor | None) -> Tensor:
    """Return the rows (N, n) of X, (B, T, n) or (B T, n), where `mask` (B, T) is True; every row for other shapes."""
    if mask is not None and X.shape[:-1] in (mask.shape, (mask.numel(),)):
        return X[mask.reshape(X.shape[:-1])]
    return X.reshape(-1, X.shape[-1])
