"""Steps between two truncations: along the gradient, and how much of it to take, or to a closed-form solution.

Shapes: the kept original W, the truncated W' and the gradient g at W' are all (m, n).
"""

import math
from collections.abc import Callable, Mapping

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


def natural_lengths(reaches: Mapping[str, float], squares: Mapping[str, float], radius: float) -> dict[str, float]:
    """Factors t of steps `t H` along the whitened gradients H, all of them together as long as `radius`.

    They are to each other as the projections `<G, D> / <H, H>`, which end, of all steps along the natural gradient
    `R^-T H L^-1`, nearest to the whitened original weight, since `<H, R^T D L> = <G, D>` with `D = W - W'`. Where that
    is against the descent, as noise can have it, t is 0. How far they are to go noise leaves open: it makes gradients
    long, and projections find little along them. `radius^2 / 2` is what the metric takes for the divergence between
    predictions before and after (nats a token), as a trust region has it (arXiv 1503.05671).

    Args:
        reaches: `<G, D>` of each matrix.
        squares: `<H, H>` of each.
        radius: square root of `sum t^2 <H, H>`.
    """
    projections = {name: min(0.0, reach) / squares[name] for name, reach in reaches.items()}
    together = math.sqrt(sum(t * t * squares[name] for name, t in projections.items()))
    scale = radius / together if together > 0 else 0.0
    return {name: scale * t for name, t in projections.items()}


def linear_decay(done: int, steps: int) -> float:
    """`1 - done / steps`: the step after `done` ones of `steps`, relative to the first, on a line that ends at zero."""
    return 1.0 - done / steps


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
