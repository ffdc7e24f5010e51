"""Gradient steps between two truncations, and their lengths.

Shapes: the original W, the truncated W' and the gradient g at W' are all (m, n).
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
    """Return `W' + (<g, D> / <g, g>) g` with `D = W - W'`, the truncated weight plus the projection of D onto g.

    Of all steps along g, this one ends nearest to the original weight (arXiv 2602.02848).

    Args:
        truncated: W', at which the gradient was computed.
        original: W, before any truncation.
        gradient: nonzero g = dL/dW'.
        over_rows: function that turns sums over this process's part of a matrix into sums over the full matrix.
    """
    g = gradient.to(truncated.dtype)
    D = original.to(truncated.dtype) - truncated
    gD, gg = over_rows(torch.stack([(g * D).sum(), (g * g).sum()]))
    stepped: Tensor = truncated + gD / gg * g
    return stepped


def natural_lengths(reaches: Mapping[str, float], squares: Mapping[str, float], radius: float) -> dict[str, float]:
    """Return the factors t of steps `t H` along the whitened gradients H, with a total length of `radius`.

    The factors are proportional to the projections `<G, D> / <H, H>`. Of all steps along the natural gradient
    `R^-T H L^-1`, the projected one ends nearest to the whitened original weight, since `<H, R^T D L> = <G, D>` with
    `D = W - W'`. If the projection points uphill, which noise can cause, t is 0. The total length is a parameter
    because noise makes the projections unreliable: it makes gradients long and their projections short. `radius^2 / 2`
    is the metric's estimate of the divergence between the predictions before and after the step, in nats per token, as
    in a trust region (arXiv 1503.05671).

    Args:
        reaches: `<G, D>` of each matrix.
        squares: `<H, H>` of each matrix.
        radius: total length `sqrt(sum t^2 <H, H>)`.

    Returns:
        Name -> t, at most 0. All t are 0 if every projection points uphill.
    """
    projections = {name: min(0.0, reach) / squares[name] for name, reach in reaches.items()}
    together = math.sqrt(sum(t * t * squares[name] for name, t in projections.items()))
    scale = radius / together if together > 0 else 0.0
    return {name: scale * t for name, t in projections.items()}


LARGEST_PART = 0.5
"""Largest length of a natural step, relative to that of the truncation."""


def trusted_radius(radius: float, truncation_loss: float) -> float:
    """Return the length of the first natural step: `radius`, but at most half of the length of the truncation.

    A truncation that is estimated to raise the loss by `truncation_loss` nats has length `sqrt(2 truncation_loss)` in
    the coordinates of the metric. Lengths in these coordinates shrink with the loss. In a model that fits its data
    well, a step of fixed length would therefore change the weights by far more than the truncation did.

    Args:
        radius: the setting `step_radius`.
        truncation_loss: second-order change of the loss from all dropped components, in nats.

    Example:
        >>> trusted_radius(0.03, truncation_loss=0.2), trusted_radius(0.03, truncation_loss=5e-5)
        (0.03, 0.005)
    """
    return min(radius, LARGEST_PART * math.sqrt(2 * truncation_loss))


def linear_decay(done: int, steps: int) -> float:
    """Return `1 - done / steps`, the relative length of the next step after `done` of `steps` steps.

    Example:
        >>> linear_decay(1, 4)
        0.75
    """
    return 1.0 - done / steps


def best_fraction(before: float, slope: float, after: float) -> float:
    """Return the fraction t in [0, 1] of a step that minimizes a parabola through the loss.

    All matrices step at once, each by its projection, and together they may overshoot the minimum. The parabola matches
    the loss and its slope at t = 0, and the loss at t = 1.

    Args:
        before: loss at the truncated weights.
        slope: `sum <g, step>` over all matrices, the first-order change of the loss for the full step.
        after: loss after the full step.

    Example:
        >>> best_fraction(before=1.0, slope=-1.0, after=1.0)
        0.5
    """
    curvature = after - before - slope
    if curvature <= 0:
        return 1.0 if after < before else 0.0
    return min(1.0, max(0.0, -slope / (2 * curvature)))
