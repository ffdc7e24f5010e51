"""Checks of the calibration loss, and collection of the gradients of a calibration batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zssvd_lightning.errors import CalibrationError, NonFiniteError, ZeroGradientError
from zssvd_lightning.model.targets import Target
from zssvd_lightning.whitening.moments import Moments


def check_terms(terms: float) -> None:
    """Raise CalibrationError unless a batch has loss terms."""
    if not terms > 0:
        raise CalibrationError(f"a calibration batch counts {terms} loss terms, but needs some; drop such batches")


def checked_loss(loss: Any) -> Tensor:
    """Return the loss if it is a finite scalar with a graph.

    Raises:
        CalibrationError: the loss is not a scalar tensor with gradients.
        NonFiniteError: the loss is NaN or infinite.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad or loss.is_complex():
        found = f"{loss.dtype} of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise CalibrationError(
            f"calibration needs a real scalar loss that depends on the target layers, got {found}; return the mean loss"
        )
    if not torch.isfinite(loss):
        raise NonFiniteError(
            f"the loss of a calibration batch is {loss.item()}; check the batch, or calibrate in float32 or bfloat16"
        )
    return loss


def collect_gradients(targets: Mapping[str, Target], moments: Moments, weight: float) -> None:
    """Add `weight` times the gradients on the targets to `moments`, and clear the gradients."""
    for name, target in targets.items():
        if (gradient := target.gradient) is not None:
            moments.add_gradient(name, gradient, weight)
        target.module.weight.grad = None


def refuse_no_gradient(moments: Moments) -> None:
    """Raise ZeroGradientError if layers ran in the forward pass, but none has got a gradient so far."""
    ran = list(moments.leaders)
    if ran and not (moments.gradient_sums or moments.with_gradient):
        raise ZeroGradientError(
            f"the loss has no gradient at any layer, though {', '.join(ran[:3])} ({len(ran)} layers) ran: they run "
            "under torch.no_grad, or their outputs are detached; let the loss depend on them"
        )


def send_back_drawn(outputs: Sequence[Tensor], inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Backpropagate drawn gradients through hooks alone. Raises CalibrationError where that is not possible."""
    try:
        torch.autograd.grad(outputs, inputs, gradients, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        raise CalibrationError(
            f"drawn gradients cannot be sent back from the logits: {error}; if activations are checkpointed, set "
            "use_reentrant=False, else set output_side to 'empirical'"
        ) from error


def mean_loss(entries: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the mean loss and the number of terms over batches that several processes saw at the same time."""
    terms = sum(entry[1] for entry in entries)
    return sum(loss * weight for loss, weight in entries) / terms, terms
