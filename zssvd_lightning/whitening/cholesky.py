"""Whitening: coordinates in which the truncation error equals the output error, or estimates the loss change.

A metric has one square root of a second moment on each side of the weight: `R^T W L = U S V^T`. `L L^T` is the second
moment of the input, `R R^T` that of the gradient with respect to the output. Every square root of the same moment gives
the same truncation.

Shapes: W (m, n); A (n, n) and L (n, n) with `A + eps I = L L^T`; B (m, m) and R (m, m) with `B + eps I = R R^T`.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from zssvd_lightning._numerics import in_float64
from zssvd_lightning.errors import NotPositiveDefiniteError, RankDeficientWarning

FIRST_JITTER = 1e-8
"""First jitter to try, relative to the mean of the diagonal."""


HARMLESS_JITTER = 1e-6
"""Largest jitter that changes little in a second moment of enough tokens, relative to the mean of the diagonal."""


LAST_JITTER = 1e-1
"""Largest jitter to try, relative to the mean of the diagonal."""


@dataclass(frozen=True)
class Root:
    """Square root S of a second moment `S S^T`."""

    S: Tensor | None = None
    """Lower triangular (n, n), or the diagonal (n,) of a diagonal S, or None for the identity."""
    jitter: float = 0.0
    """Jitter added to the moment's diagonal, relative to its mean. 0 if the metric's damping was enough."""

    def times(self, M: Tensor) -> Tensor:
        """Return `M S` (r, n) for M (r, n)."""
        if self.S is None:
            return M
        S = self.S.to(M)
        return M * S if S.ndim == 1 else M @ S

    def over(self, M: Tensor) -> Tensor:
        """Return `M S^-1` (r, n) for M (r, n)."""
        return self._solved(M, transposed=False)

    def over_transposed(self, M: Tensor) -> Tensor:
        """Return `M S^-T` (r, n) for M (r, n)."""
        return self._solved(M, transposed=True)

    def diagonal(self, n: int) -> Tensor:
        """Return the diagonal of `S S^T` (n,)."""
        if self.S is None:
            return torch.ones(n, dtype=torch.float64)
        return self.S.square() if self.S.ndim == 1 else self.S.square().sum(1)

    def _solved(self, M: Tensor, *, transposed: bool) -> Tensor:
        if self.S is None:
            return M
        S = self.S.to(M)
        if S.ndim == 1:
            return M / S
        solved: Tensor = torch.linalg.solve_triangular(S.T if transposed else S, M, upper=transposed, left=False)
        return solved


IDENTITY = Root()
"""Root that changes no coordinates."""


@dataclass(frozen=True)
class Whitening:
    """Change of coordinates on both sides of a weight."""

    inputs: Root = Root()
    """Root L (n, n) of the input second moment."""
    outputs: Root = Root()
    """Root R (m, m) of the output-gradient second moment."""

    def whiten(self, W: Tensor) -> Tensor:
        """Return the whitened weight `R^T W L` (m, n)."""
        return self.outputs.times(self.inputs.times(W).T).T

    def whiten_gradient(self, G: Tensor) -> Tensor:
        """Return `H = R^-1 G L^-T` (m, n), the gradient with respect to the whitened weight."""
        return self.outputs.over_transposed(self.inputs.over_transposed(G).T).T

    def unwhiten(self, Z: Tensor) -> Tensor:
        """Return `R^-T Z L^-1` (m, n), the inverse of `whiten`."""
        return self.unwhiten_left(self.unwhiten_right(Z))

    def unwhiten_right(self, Vh: Tensor) -> Tensor:
        """Return `Vh L^-1` (r, n)."""
        return self.inputs.over(Vh)

    def unwhiten_left(self, U: Tensor) -> Tensor:
        """Return `R^-T U` (m, r)."""
        return self.outputs.over(U.T).T


def safe_cholesky(moment: Tensor, name: str, damping: float = 0.0, of: str = "input") -> tuple[Tensor, float]:
    """Factorize a second moment by Cholesky, adding eps to its diagonal.

    eps is relative to the mean of the diagonal. It starts at `damping` and grows tenfold until the factorization
    succeeds.

    Args:
        moment: second moment (n, n), symmetric and finite.
        name: layer name, for the error message.
        damping: initial eps.
        of: name of the quantity that the moment belongs to, for the error message.

    Returns:
        The lower triangular root (n, n) in float64, and the final eps, or 0 if `damping` was enough.

    Raises:
        NotPositiveDefiniteError: the factorization fails even with a tenth of the mean diagonal.
    """
    moment = in_float64(moment)
    diagonal = moment.diagonal()
    before, scale, jitter = diagonal.clone(), diagonal.mean(), damping
    try:
        while scale > 0 and jitter <= LAST_JITTER:
            diagonal.copy_(before + jitter * scale)  # in place, because another copy may be large
            root, failed = torch.linalg.cholesky_ex(moment)
            if not failed:
                return root, jitter if jitter > damping else 0.0
            jitter = max(FIRST_JITTER, jitter * 10)
    finally:
        diagonal.copy_(before)
    raise NotPositiveDefiniteError(
        f"the {of} second moment of {name} {tuple(moment.shape)} is not positive definite even with jitter "
        f"{LAST_JITTER} of its mean diagonal {scale:.3g}; it may be all zero: calibrate on other batches, or add it to "
        "ignore"
    )


def warn_of_jitter(by_layer: Mapping[str, float]) -> None:
    """Issue one RankDeficientWarning for all layers with a singular second moment, with the jitter of each layer."""
    jitters = {name: jitter for name, jitter in by_layer.items() if jitter}
    if jitters:
        few = ", ".join(f"{name} {jitter:.0e}" for name, jitter in list(jitters.items())[:5])
        warnings.warn(
            f"layers with a singular second moment: {len(jitters)}. Each got jitter, relative to its mean "
            f"diagonal: {few}{', ...' if len(jitters) > 5 else ''}. Calibrate on more tokens",
            RankDeficientWarning,
            stacklevel=2,
        )
