"""Estimate what rounding costs the loss: by component for 8-bit factors, and by row of a weight."""

from typing import NamedTuple

import torch
from torch import Tensor

from zssvd_lightning._numerics import in_float64
from zssvd_lightning.layers.int8 import LARGEST_CODE
from zssvd_lightning.whitening.cholesky import Whitening
from zssvd_lightning.whitening.spectrum import Spectrum


class Importance(NamedTuple):
    """What the loss makes of errors in a layer, up to a factor that all layers share."""

    outputs: Tensor
    """(m,): second derivative of the loss by an output, estimated; see `importance`."""
    inputs: Tensor
    """(n,): mean square of an input."""


def importance(mean_squares: Tensor, H: Tensor) -> Importance:
    """Importance of a layer's outputs and inputs, from what calibration has gathered.

    The mean gradient of T tokens is `G = 1/T sum d x^T`. At a minimum, where d has mean 0, row i of `H = G L^-T` has
    the expected square `n/T E[d_i^2]`, whatever the inputs are; `E[d_i^2]` is the diagonal of the Fisher information.

    Args:
        mean_squares: of the inputs (n,), the diagonal of their second moment.
        H: mean gradient in coordinates where the input is white (m, n).
    """
    return Importance(H.square().mean(1), mean_squares)


def rounding_by_component(spectrum: Spectrum, whitening: Whitening) -> Tensor:
    """What keeping each component (r,) in 8 bits is predicted to cost, as half a squared singular value does.

    Entries of the two sides of a component, `u (m,)` and `v (n,)`, get independent errors of variance `step^2 / 12`,
    with steps of a 127th of the largest. In the metric, whitened sides have the squared norm sigma, so that it costs
    `sigma / 24 (step_u^2 tr B + step_v^2 tr A)`.
    """
    up, down = spectrum.factors(torch.arange(len(spectrum.sigma), device=spectrum.sigma.device))
    up_steps, down_steps = up.abs().amax(0) / LARGEST_CODE, down.abs().amax(1) / LARGEST_CODE
    B, A = whitening.outputs.diagonal(len(up)).sum(), whitening.inputs.diagonal(down.shape[1]).sum()
    costs: Tensor = spectrum.sigma / 24 * (up_steps.square() * B.to(up) + down_steps.square() * A.to(up))
    return costs


def rounding_of_dense(W: Tensor, whitening: Whitening) -> float:
    """What it is predicted to cost to keep a dense weight in 8 bits, with a step a row.

    That is `tr A / 24 sum_i step_i^2 B_ii`.
    """
    steps = in_float64(W.abs().amax(1)) / LARGEST_CODE
    B, A = whitening.outputs.diagonal(len(W)).to(steps), whitening.inputs.diagonal(W.shape[1]).sum()
    return float(A.to(steps) / 24 * (steps.square() * B).sum())
