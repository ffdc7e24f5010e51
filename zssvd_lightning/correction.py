"""The projected gradient step between two truncations.

Shapes: the kept original W, the truncated W' and the gradient g at W' are all (m, n).
"""

from torch import Tensor


def projected_step(truncated: Tensor, original: Tensor, gradient: Tensor) -> Tensor:
    """`W' + (<g, D> / <g, g>) g` with `D = W - W'`: the part of what truncation took that the loss sees.

    Of all steps along g it is the one that ends nearest to the original weight (arXiv 2602.02848).

    Args:
        truncated: W', where the gradient was taken.
        original: W, before any truncation.
        gradient: g = dL/dW', not zero.
    """
    g = gradient.to(truncated.dtype)
    D = original.to(truncated.dtype) - truncated
    return truncated + (g * D).sum() / (g * g).sum() * g
