"""Shrinkage of a second moment that few tokens estimate toward one that many do.

Shapes: A (n, n).
"""

import math

import torch
from torch import Tensor

from zssvd_lightning._numerics import exact_products


@torch.no_grad()
def shrinkage(A: Tensor, tokens: float, mean: Tensor) -> float:
    """Return the weight of `mean` in [0, 1] that makes `(1 - w) A + w mean` closest to the true second moment.

    The expected squared distance (Frobenius) is least at `w = E||A - S||^2 / E||A - mean||^2`, where S is the true
    second moment (Ledoit and Wolf 2003, doi:10.1016/S0927-5398(03)00007-0, with a target that is known much better than
    A). For Gaussian rows, `E||A - S||^2 = (tr(S)^2 + ||S||^2) / T`. S is estimated by A, and the denominator by its
    value. The weight is about 1 for a few tokens and falls as 1/T, unless A and `mean` are the same. It is 0 if one of
    them is not finite, so that the error for that names the right layer.

    Args:
        A: second moment over the tokens of one expert.
        tokens: T, the number of these tokens.
        mean: second moment over the tokens of all experts.
    """
    distance = float((A - mean).square().sum())
    if not math.isfinite(distance):
        return 0.0
    noise = float(A.diagonal().sum().square() + A.square().sum()) / tokens
    return min(1.0, noise / distance) if distance > 0 else 1.0


def shrunk_sum(own: Tensor, tokens: float, everyone: Tensor, all_tokens: float) -> Tensor:
    """Return the sum over T tokens that stands for the shrunk second moment.

    Args:
        own: `X^T X` (n, n) of one expert.
        tokens: T, the number of rows of X.
        everyone: sum of `X^T X` over all experts of the layer.
        all_tokens: number of rows in that sum.
    """
    with exact_products():
        A, mean = own / tokens, everyone / all_tokens
        weight = shrinkage(A, tokens, mean)
        return torch.lerp(A, mean, weight) * tokens if weight > 0 else own
