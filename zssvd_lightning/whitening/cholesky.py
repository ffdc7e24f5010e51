"""Metrics: the coordinates in which a truncation's error is what it does to the output, or to the loss.

A metric is a square root of a second moment on either side of the weight: `R^T W L = U S V^T`, with `L L^T` of the
input and `R R^T` of the gradient by the output. Which square root it is makes no difference to truncations.

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
"""Relative to the mean of the diagonal."""


LAST_JITTER = 1e-1


@dataclass(frozen=True)
class Root:
    """A square root S of a second moment, `S S^T`."""

    S: Tensor | None = None
    """(n, n) lower triangular, (n,) the diagonal of a diagonal one, or None for the identity."""
    jitter: float = 0.0
    """What was added to the moment's diagonal, relative to its mean, beyond what the metric adds to all."""

    def times(self, M: Tensor) -> Tensor:
        """`M S`, of M (r, n)."""
        if self.S is None:
            return M
        S = self.S.to(M)
        return M * S if S.ndim == 1 else M @ S

    def over(self, M: Tensor) -> Tensor:
        """`M S^-1`, of M (r, n)."""
        return self._solved(M, transposed=False)

    def over_transposed(self, M: Tensor) -> Tensor:
        """`M S^-T`, of M (r, n)."""
        return self._solved(M, transposed=True)

    def diagonal(self, n: int) -> Tensor:
        """The diagonal of `S S^T` (n,)."""
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


@dataclass(frozen=True)
class Whitening:
    """A change of coordinates on both sides of a weight."""

    inputs: Root = Root()
    """L."""
    outputs: Root = Root()
    """R."""

    def whiten(self, W: Tensor) -> Tensor:
        """`R^T W L` (m, n)."""
        return self.outputs.times(self.inputs.times(W).T).T

    def whiten_gradient(self, G: Tensor) -> Tensor:
        """`H = R^-1 G L^-T` (m, n), the gradient by the whitened weight."""
        return self.outputs.over_transposed(self.inputs.over_transposed(G).T).T

    def unwhiten(self, Z: Tensor) -> Tensor:
        """`R^-T Z L^-1` (m, n): undoes `whiten`."""
        return self.unwhiten_left(self.unwhiten_right(Z))

    def unwhiten_right(self, Vh: Tensor) -> Tensor:
        """`Vh L^-1` (r, n)."""
        return self.inputs.over(Vh)

    def unwhiten_left(self, U: Tensor) -> Tensor:
        """`R^-T U` (m, r)."""
        return self.outputs.over(U.T).T


def safe_cholesky(moment: Tensor, name: str, damping: float = 0.0, of: str = "input") -> tuple[Tensor, float]:
    """Lower triangular root (n, n), float64, of a second moment with eps on its diagonal, and eps beyond the damping.

    eps is relative to the mean diagonal. It starts at `damping` and grows tenfold until the factorization succeeds.

    Args:
        moment: (n, n), symmetric, finite.
        name: of the layer, for the message.
        damping: what eps starts at.
        of: what the moment is of, for the message.

    Raises:
        NotPositiveDefiniteError: a tenth of the mean diagonal was not enough.
    """
    moment = in_float64(moment)
    scale = moment.diagonal().mean()
    jitter = damping
    while scale > 0 and jitter <= LAST_JITTER:
        shifted = moment.clone() if jitter else moment
        shifted.diagonal().add_(jitter * scale)
        root, failed = torch.linalg.cholesky_ex(shifted)
        if not failed:
            return root, jitter if jitter > damping else 0.0
        jitter = max(FIRST_JITTER, jitter * 10)
    raise NotPositiveDefiniteError(
        f"the {of} second moment of {name} {tuple(moment.shape)} is not positive definite even with jitter "
        f"{LAST_JITTER} of its mean diagonal {scale:.3g}; it may be all zero: calibrate on other batches, or add it to "
        "ignore"
    )


def warn_of_jitter(by_layer: Mapping[str, float]) -> None:
    """One RankDeficientWarning for all layers whose second moment was singular, with the jitter of each."""
    jitters = {name: jitter for name, jitter in by_layer.items() if jitter}
    if jitters:
        few = ", ".join(f"{name} {jitter:.0e}" for name, jitter in list(jitters.items())[:5])
        warnings.warn(
            f"layers with a singular second moment: {len(jitters)}. Each got jitter, relative to its mean "
            f"diagonal: {few}{', ...' if len(jitters) > 5 else ''}. Before the first truncation, calibrate on more "
            "tokens; after it, inputs of low rank are to be expected behind low-rank layers",
            RankDeficientWarning,
            stacklevel=2,
        )
