"""Differentiable stand-ins for the rank of a weight (Low-Rank Prehab, arXiv 2512.01980), with their gradients.

Shapes: W (m, n) weight, A (n, n) second moment of the layer's inputs, L (n, n) its Cholesky factor with
`A + eps I = L L^T`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from zssvd_lightning.whitening.cholesky import safe_cholesky

FIRST_ITERATIONS = 50
"""Power iterations from a random vector, as many as the paper's code takes at every step."""


NEXT_ITERATIONS = 2
"""Power iterations from the vector of the step before."""


FIRST_FRACTION = 1e-5
"""Of the full weight, at the start of the exponential schedule: the paper's code goes from 1e-4 to 10."""


class Term(NamedTuple):
    """The regularizer of one layer."""

    value: Tensor
    """R, a scalar."""
    gradient: Tensor
    """dR/dW (m, n)."""
    u: Tensor | None
    """(m,) first left singular vector of `W L`, as far as it is known, where the regularizer needs it."""


def stable_rank(W: Tensor, A: Tensor, u: Tensor | None = None) -> Term:
    """`||W L||_F^2 / ||W L||_2^2` with `A = L L^T`, between 1 and min(m, n); 0 for W = 0.

    Neither `W L` nor its decomposition is needed: `||W L||_F^2 = <W, W A>`, and power iterations `u <- W A W^T u` lead
    to `||W L||_2^2 = u^T W A W^T u`. The gradient is that at fixed u, `2 (W A - R u u^T W A) / ||W L||_2^2`, which is
    the true one once u is the first left singular vector. Before that, R is too large; it is kept from going above
    min(m, n), where its gradient is 0.

    Args:
        W: weight (m, n), in the type of A.
        A: second moment (n, n), which may be singular, in the type that it is all computed in.
        u: from the step before, (m,); None at first.
    """
    iterations = NEXT_ITERATIONS
    if u is None:
        iterations = FIRST_ITERATIONS
        u = torch.randn(len(W), generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(W)
    WA = W @ A
    for _ in range(iterations):
        longer = WA @ (W.T @ u)
        length = longer.norm()
        u = torch.where(length > 0, longer / length, u)
    uWA = WA.T @ u
    squared_frobenius = (W * WA).sum()
    least = (squared_frobenius / min(W.shape)).clamp_min(torch.finfo(W.dtype).tiny)
    found = uWA @ (W.T @ u)
    squared_spectral = torch.maximum(found, least)
    value = squared_frobenius / squared_spectral
    gradient = WA.addr_(-value * u, uWA).mul_(torch.where(found < least, 0.0, 2 / squared_spectral))
    return Term(value, gradient, u)


def nuclear_norm(W: Tensor, L: Tensor, u: Tensor | None = None) -> Term:
    """`||W L||_*`, the sum of the singular values; its gradient is `U V^T L^T` for `W L = U S V^T`.

    It is not free of scale, as it is not in the paper's code, and takes a whole decomposition of every layer at every
    step.

    Args:
        W: weight (m, n), in the type of L.
        L: Cholesky factor (n, n) in the type that it is all computed in.
        u: not used.
    """
    whitened = W @ L
    if not torch.isfinite(whitened).all():  # which decompositions do not take
        return Term(whitened.new_tensor(math.nan), torch.full_like(W, math.nan), None)
    U, sigma, Vh = torch.linalg.svd(whitened, full_matrices=False)
    return Term(sigma.sum(), (U @ Vh) @ L.T, None)


class Regularizer(NamedTuple):
    """A stand-in for the rank of `W L`."""

    term: Callable[[Tensor, Tensor, Tensor | None], Term]
    """From W, what is kept of A, and the u of the step before."""
    kept: Callable[[Tensor, str], tuple[Tensor, float]]
    """From A and the name of its layer to what the term needs of it (n, n), and the jitter that took."""
    metric: str
    """What loggers know it by."""


REGULARIZERS = {
    "stable_rank": Regularizer(stable_rank, lambda A, name: (A, 0.0), "stable_rank"),
    "nuclear": Regularizer(nuclear_norm, safe_cholesky, "nuclear_norm"),
}


SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: done,
    "exponential": lambda done: math.pow(FIRST_FRACTION, 1 - done),
}
"""From the fraction of the steps that are done, in (0, 1], to that of the full weight."""
