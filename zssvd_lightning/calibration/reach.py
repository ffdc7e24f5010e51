"""Which layers the calibration batches have reached, and why they have not reached the others."""

from collections.abc import Callable, Mapping
from enum import StrEnum

import torch
from torch import Tensor

from zssvd_lightning.distributed import LayerSet
from zssvd_lightning.whitening.moments import Moments


class Unreached(StrEnum):
    """Reason why statistics of a layer are missing."""

    NEVER_RAN = "saw no token"
    """The layer was not called, or only with padding or without tokens, as an expert that no token is routed to."""
    NOT_CALLED = "has its weight read by other code, but is not called itself"
    """There is a gradient, but no input was seen."""
    NO_GRADIENT = "ran, but no gradient came back to it"
    """The output does not reach the loss, or the layer ran without a graph."""
    ZERO_GRADIENT = "has a gradient of exactly zero"
    """The loss does not change with the weight, as where a later weight is zero."""
    NO_OUTPUT_GRADIENT = "has no gradient at its output from the logits"
    """There is a gradient of the loss, but none of the drawn gradients reaches the layer."""
    NO_CURVATURE = "has no curvature along its components"
    """No gradient came back to the layer in the batches that measure the curvature."""


REMEDIES = {
    Unreached.NEVER_RAN: "calibrate on batches that reach them",
    Unreached.NOT_CALLED: "call the layer in the forward pass of the model",
    Unreached.NO_GRADIENT: "let their output reach the loss with its graph, unless they are a teacher's",
    Unreached.ZERO_GRADIENT: "calibrate after some training, or with a loss that depends on them",
    Unreached.NO_OUTPUT_GRADIENT: "set output_side to 'empirical'",
    Unreached.NO_CURVATURE: "raise correction_batches",
}
"""Remedies by which layers are reached."""


def unreached(
    layers: LayerSet, moments: Moments, *, inputs: bool = True, outputs: bool = False
) -> dict[str, Unreached]:
    """Return the layers without statistics, in module order. Collective.

    A layer that ran on one process only has run.

    Args:
        layers: the layers, and the processes that hold them.
        moments: statistics of this process, with the counts of all processes.
        inputs: True if second moments of the inputs are needed.
        outputs: True if second moments of the output gradients are needed.
    """
    gradient = _nonzero_somewhere(layers, moments.gradient_sums)
    output = _nonzero_somewhere(layers, moments.output_sums, Tensor.diagonal)

    def reason(name: str) -> Unreached | None:
        if inputs and not moments.tokens.get(moments.leaders.get(name, name)):
            return Unreached.NOT_CALLED if name in gradient else Unreached.NEVER_RAN
        if name not in gradient:
            return Unreached.ZERO_GRADIENT if name in moments.with_gradient else Unreached.NO_GRADIENT
        if outputs and name not in output:
            return Unreached.NO_OUTPUT_GRADIENT
        return None

    return {name: found for name in layers if (found := reason(name)) is not None}


def without_curvature(layers: LayerSet, moments: Moments) -> dict[str, Unreached]:
    """Return the layers along whose components no curvature was measured, in module order. Collective."""
    measured = _nonzero_somewhere(layers, moments.component_sums)
    return {name: Unreached.NO_CURVATURE for name in layers if name not in measured}


def named(reasons: Mapping[str, Unreached], shown: int = 3) -> str:
    """Return the layers by reason, the first few of each with their number, and what to do.

    Example:
        >>> named({"a": Unreached.NEVER_RAN, "b": Unreached.NEVER_RAN}, shown=1)
        'a, ... (2 layers): saw no token; calibrate on batches that reach them'
    """
    parts = []
    for reason, remedy in REMEDIES.items():
        names = [name for name, found in reasons.items() if found is reason]
        if names:
            listed = ", ".join(names[:shown]) + (f", ... ({len(names)} layers)" if len(names) > shown else "")
            parts.append(f"{listed}: {reason}; {remedy}")
    return ". ".join(parts)


def _nonzero_somewhere(
    layers: LayerSet, sums: Mapping[str, Tensor], part: Callable[[Tensor], Tensor] = lambda total: total
) -> set[str]:
    """Return the layers whose sum, or a part of it, is not exactly zero on some process. Collective.

    NaN counts as not zero.
    """
    found: set[str] = set()
    if sums:
        flags = torch.stack([part(total).any().to(layers.device) for total in sums.values()]).tolist()
        found = {name for name, flag in zip(sums, flags, strict=True) if flag}
    return set().union(*layers.team.gathered(found))
