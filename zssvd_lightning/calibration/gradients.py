"""Checks of the calibration loss, and collection of the gradients of a calibration batch."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zssvd_lightning.errors import CalibrationError, NonFiniteError, ZeroGradientError
from zssvd_lightning.model.targets import Target
from zssvd_lightning.whitening.moments import Moments


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
    """Add `weight` times the gradients on the targets to `moments`, and clear the gradients.

    Raises:
        ZeroGradientError: a layer ran in the forward pass but got no gradient.
    """
    for name, target in targets.items():
        if (gradient := target.gradient) is not None:
            moments.add_gradient(name, gradient, weight)
        target.module.weight.grad = None
    known = {*moments.gradient_sums, *moments.with_gradient}
    if without := [name for name in moments.leaders if name not in known]:
        raise ZeroGradientError(
            f"the loss has no gradient at {', '.join(without[:3])} ({len(without)} layers), though they run in the "
            "forward pass: it is under torch.no_grad or its output is detached, as a teacher's; or activations are "
            "checkpointed with use_reentrant=True. Add them to ignore, or set use_reentrant=False"
        )
