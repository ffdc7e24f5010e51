"""Estimates of the loss increase from rounding to 8 bits: per component of the factors, and for a dense weight."""

from typing import NamedTuple

import torch
from torch import Tensor

from zssvd_lightning._numerics import in_float64
from zssvd_lightning.layers.int8 import LARGEST_CODE
from zssvd_lightning.whitening.cholesky import Whitening
from zssvd_lightning.whitening.spectrum import Spectrum


class Importance(NamedTuple):
    """Sensitivity of the loss to errors in a layer, up to a factor that all layers share."""

    outputs: Tensor
    """Estimated second derivative of the loss with respect to each output (m,); see `importance`."""
    inputs: Tensor
    """Mean square of each input (n,)."""


def importance(mean_squares: Tensor, H: Tensor) -> Importance:
    """Return the importance of a layer's outputs and inputs from calibration statistics.

    The mean gradient over T tokens is `G = 1/T sum d x^T`. At a minimum, where d has mean 0, row i of `H = G L^-T` has
    the expected squared norm `n/T E[d_i^2]` for any inputs. `E[d_i^2]` is the diagonal of the Fisher information.

    Args:
        mean_squares: mean squares of the inputs (n,), the diagonal of their second moment.
        H: mean gradient (m, n) in coordinates where the input is white.
    """
    return Importance(H.square().mean(1), mean_squares)


def rounding_by_component(spectrum: Spectrum, whitening: Whitening) -> Tensor:
    """Return the predicted loss increase (r,) from storing each component in 8 bits.

    The scale is that of half a squared singular value. The entries of both sides of a component, `u (m,)` and
    `v (n,)`, get independent errors of variance `step^2 / 12`, where the step is the largest entry divided by 127. The
    whitened sides have squared norm sigma, so the cost is `sigma / 24 (step_u^2 tr B + step_v^2 tr A)`.
    """
    up, down = spectrum.factors(torch.arange(len(spectrum.sigma), device=spectrum.sigma.device))
    up_steps, down_steps = up.abs().amax(0) / LARGEST_CODE, down.abs().amax(1) / LARGEST_CODE
    B, A = whitening.outputs.diagonal(len(up)).sum(), whitening.inputs.diagonal(down.shape[1]).sum()
    costs: Tensor = spectrum.sigma / 24 * (up_steps.square() * B.to(up) + down_steps.square() * A.to(up))
    return costs


def rounding_of_dense(W: Tensor, whitening: Whitening) -> float:
    """Return the predicted loss increase from storing a dense weight W (m, n) in 8 bits, with one step per row.

    It is `tr A / 24 sum_i step_i^2 B_ii`.
    """
    steps = in_float64(W.abs().amax(1)) / LARGEST_CODE
    B, A = whitening.outputs.diagonal(len(W)).to(steps), whitening.inputs.diagonal(W.shape[1]).sum()
    return float(A.to(steps) / 24 * (steps.square() * B).sum())
