"""The projected gradient step between two truncations, and how much of it to take.

Shapes: the kept original W, the truncated W' and the gradient g at W' are all (m, n).
"""

from collections.abc import Callable

import torch
from torch import Tensor


def projected_step(
    truncated: Tensor,
    original: Tensor,
    gradient: Tensor,
    over_rows: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Tensor:
    """`W' + (<g, D> / <g, g>) g` with `D = W - W'`: the part of what truncation took that the loss sees.

    Of all steps along g it is the one that ends nearest to the original weight (arXiv 2602.02848).

    Args:
        truncated: W', where the gradient was taken.
        original: W, before any truncation.
        gradient: g = dL/dW', not zero.
        over_rows: makes sums over a matrix of those over its parts, where processes hold parts of it.
    """
    g = gradient.to(truncated.dtype)
    D = original.to(truncated.dtype) - truncated
    gD, gg = over_rows(torch.stack([(g * D).sum(), (g * g).sum()]))
    stepped: Tensor = truncated + gD / gg * g
    return stepped


def natural_step(Z: Tensor, H: Tensor, reach: float) -> Tensor:
    """`Z + (<G, D> / <H, H>) H`: the projected step as the metric measures it.

    With `D = W - W'` it ends, of all steps along the natural gradient `R^-T H L^-1`, nearest to the whitened original
    weight, since `<H, R^T D L> = <G, D>`.

    Args:
        Z: whitened weight `R^T W' L` (m, n).
        H: whitened gradient `R^-1 G L^-T` (m, n), not zero.
        reach: `<G, D>`, or a multiple of it for a longer step.
    """
    stepped: Tensor = Z + reach / (H * H).sum() * H
    return stepped


def best_fraction(before: float, slope: float, after: float) -> float:
    """The part t in [0, 1] of a step at which the loss is least, on the parabola through what is known of it.

    All matrices step at once, each by the length of its own projection, and together they may go far past the minimum.
    The parabola has the loss at t = 0, its slope there, and the loss at t = 1.

    Args:
        before: loss at the truncated weights.
        slope: `sum <g, step>` over all matrices, the first-order change of the loss for the whole step.
        after: loss after the whole step.
    """
    curvature = after - before - slope
    if curvature <= 0:
        return 1.0 if after < before else 0.0
    return min(1.0, max(0.0, -slope / (2 * curvature)))
