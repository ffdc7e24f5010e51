"""Checks of the calibration loss, and collection of the gradients of a calibration batch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from zssvd_lightning._numerics import accumulated
from zssvd_lightning.errors import CalibrationError, NonFiniteError, ZeroGradientError
from zssvd_lightning.model.targets import Target
from zssvd_lightning.whitening.moments import Moments
from zssvd_lightning.whitening.output_gradients import Draw

POSITIONS = 256
"""Number of positions whose logits are converted to float32 at a time."""


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
    for target in targets.values():
        collect_gradient(target, moments, weight)


def collect_gradient(target: Target, moments: Moments, weight: float) -> None:
    """Add `weight` times the gradient on a target to `moments`, and clear the gradient."""
    if (gradient := target.gradient) is not None:
        moments.add_gradient(target.name, gradient, weight)
    target.module.weight.grad = None


def collect_at_once(target: Target, moments: Moments, weight: Callable[[], float | None]) -> RemovableHandle:
    """Collect the gradient on a target as soon as a backward pass has added to it, until the hook is removed.

    Args:
        target: layer whose weight requires a gradient.
        moments: receives the gradient.
        weight: function that returns the weight of the gradient, or None to leave it where it is.
    """

    def collect(_: Tensor) -> None:
        if (number := weight()) is not None:
            collect_gradient(target, moments, number)

    hook: RemovableHandle = target.module.weight.register_post_accumulate_grad_hook(collect)  # type: ignore[no-untyped-call]
    return hook


def mean_loss(entries: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the mean loss and the number of terms over batches that several processes saw at the same time."""
    terms = sum(entry[1] for entry in entries)
    return sum(loss * weight for loss, weight in entries) / terms, terms


def refuse_no_gradient(moments: Moments) -> None:
    """Raise ZeroGradientError if layers ran in the forward pass, but none has got a gradient so far."""
    ran = list(moments.leaders)
    if ran and not (moments.gradient_sums or moments.with_gradient):
        raise ZeroGradientError(
            f"the loss has no gradient at any layer, though {', '.join(ran[:3])} ({len(ran)} layers) ran: they run "
            "under torch.no_grad, or their outputs are detached; let the loss depend on them"
        )


def drawn_in_place_of(found: Tensor, logits: Tensor, draw: Draw, generator: torch.Generator) -> Tensor:
    """Overwrite the gradient of the loss by the logits with drawn ones, where it is not zero, and return it."""
    drawn = found.flatten(0, -2)
    counting = drawn.any(-1)
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        parts = (torch.split(each, POSITIONS) for each in (drawn, logits.flatten(0, -2), counting))
        for rows, z, counts in zip(*parts, strict=True):
            rows[counts] = draw(z[counts].to(accumulated(z.dtype)), generator).to(rows)
    return drawn.view_as(logits)


def send_back_drawn(outputs: Sequence[Tensor], inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Backpropagate drawn gradients through hooks alone. Raises CalibrationError where that is not possible."""
    try:
        torch.autograd.grad(outputs, inputs, gradients, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        raise CalibrationError(
            f"drawn gradients cannot be sent back from the logits: {error}; if activations are checkpointed, set "
            "use_reentrant=False, else set output_side to 'empirical'"
        ) from error
