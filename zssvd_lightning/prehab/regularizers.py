"""Differentiable surrogates for the rank of a weight (Low-Rank Prehab, arXiv 2512.01980), with their gradients.

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
"""Number of power iterations from a random vector; the paper's code takes as many at every step."""


NEXT_ITERATIONS = 2
"""Number of power iterations from the vector of the previous step."""


FIRST_FRACTION = 1e-5
"""Fraction of the full weight at the start of the exponential schedule; the paper's code goes from 1e-4 to 10."""


class Term(NamedTuple):
    """Value and gradient of the regularizer for one layer."""

    value: Tensor
    """Value R, a scalar."""
    gradient: Tensor
    """Gradient dR/dW, (m, n)."""
    u: Tensor | None
    """Current estimate of the first left singular vector of `W L`, (m,); None if the regularizer does not use it."""


def stable_rank(W: Tensor, A: Tensor, u: Tensor | None = None) -> Term:
    """Return the stable rank `R = ||W L||_F^2 / ||W L||_2^2` with `A = L L^T`, and its gradient.

    R is between 1 and min(m, n); it is 0 for W = 0. Neither `W L` nor its decomposition is needed:
    `||W L||_F^2 = <W, W A>`, and power iterations `u <- W A W^T u` converge to `||W L||_2^2 = u^T W A W^T u`. The
    gradient is computed at fixed u: `2 (W A - R u u^T W A) / ||W L||_2^2`. It is exact once u is the first left
    singular vector. Before that R is too large; it is clamped to min(m, n), and the gradient is 0 where it is clamped.

    Args:
        W: weight (m, n), in the type of A.
        A: second moment (n, n), which may be singular; its type is used for all computations.
        u: vector (m,) from the previous step; None at the first step.
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
    """Return the nuclear norm `||W L||_*`, the sum of the singular values, and its gradient.

    The gradient is `U V^T L^T` for `W L = U S V^T`. As in the paper's code, the norm depends on the scale of the
    weight. It takes a full decomposition of every layer at every step.

    Args:
        W: weight (m, n), in the type of L.
        L: Cholesky factor (n, n); its type is used for all computations.
        u: not used.
    """
    whitened = W @ L
    if not torch.isfinite(whitened).all():  # decompositions fail on such values
        return Term(whitened.new_tensor(math.nan), torch.full_like(W, math.nan), None)
    U, sigma, Vh = torch.linalg.svd(whitened, full_matrices=False)
    return Term(sigma.sum(), (U @ Vh) @ L.T, None)


class Regularizer(NamedTuple):
    """Differentiable surrogate for the rank of `W L`."""

    term: Callable[[Tensor, Tensor, Tensor | None], Term]
    """Function of W, the matrix that `kept` returned, and the u of the previous step."""
    kept: Callable[[Tensor, str], tuple[Tensor, float]]
    """Function of A and its layer's name; returns the matrix (n, n) that `term` needs, and the jitter added to A."""
    metric: str
    """Name of the metric for loggers."""


REGULARIZERS = {
    "stable_rank": Regularizer(stable_rank, lambda A, name: (A, 0.0), "stable_rank"),
    "nuclear": Regularizer(nuclear_norm, safe_cholesky, "nuclear_norm"),
}


SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: done,
    "exponential": lambda done: math.pow(FIRST_FRACTION, 1 - done),
}
"""Functions from the fraction of the steps that are done, in (0, 1], to the fraction of the full weight."""
