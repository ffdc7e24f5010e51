"""Metrics: the coordinates in which a truncation's error is what it does to the output.

Shapes: W (m, n), A (n, n), L (n, n) lower triangular with `A + eps I = L L^T`.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from zssvd_lightning.errors import NotPositiveDefiniteError, RankDeficientWarning
from zssvd_lightning.statistics import Moments

FIRST_JITTER = 1e-8
"""Relative to the mean of A's diagonal."""
LAST_JITTER = 1e-1


@dataclass(frozen=True)
class Whitening:
    """A change of coordinates of the input: `x = L z` with z white."""

    L: Tensor | None
    """(n, n) lower triangular; None is the identity."""

    def whiten(self, W: Tensor) -> Tensor:
        """`W L` (m, n)."""
        return W if self.L is None else W @ self.L.to(W.dtype)

    def unwhiten(self, Vh: Tensor) -> Tensor:
        """`Vh L^-1` (r, n), by a triangular solve."""
        if self.L is None:
            return Vh
        return torch.linalg.solve_triangular(self.L.to(Vh.dtype), Vh, upper=False, left=False)


def no_whitening(moments: Moments, name: str) -> Whitening:
    """Plain SVD: the error of a truncation is `||W - W_k||_F`."""
    return Whitening(None)


def input_whitening(moments: Moments, name: str) -> Whitening:
    """By the input second moment (SVD-LLM, arXiv 2403.07378; ZS-SVD, arXiv 2602.02848): the error is the output's."""
    return Whitening(safe_cholesky(moments.second_moment(name), name))


METRICS: dict[str, Callable[[Moments, str], Whitening]] = {"input": input_whitening, "none": no_whitening}


def safe_cholesky(A: Tensor, name: str) -> Tensor:
    """Lower triangular L (n, n), float64, with `L L^T = A + eps I`.

    eps starts at 0 and grows tenfold until the factorisation succeeds; a warning then names the layer and the size.

    Raises:
        NotPositiveDefiniteError: a tenth of the mean diagonal was not enough.
    """
    A = A.double()
    scale = A.diagonal().mean()
    jitter = 0.0
    while True:
        shifted = A if jitter == 0.0 else A + jitter * scale * torch.eye(len(A), dtype=A.dtype, device=A.device)
        L, failed = torch.linalg.cholesky_ex(shifted)
        if not failed and scale > 0:
            break
        jitter = max(FIRST_JITTER, jitter * 10)
        if jitter > LAST_JITTER or not scale > 0:
            raise NotPositiveDefiniteError(
                f"the input second moment of {name} {tuple(A.shape)} is not positive definite even with jitter "
                f"{LAST_JITTER} of its mean diagonal {scale:.3g}; its inputs may be all zero: calibrate on other "
                "batches, or add it to ignore"
            )
    if jitter:
        warnings.warn(
            f"the input second moment of {name} {tuple(A.shape)} is singular; added jitter {jitter:.0e} of its mean "
            f"diagonal ({jitter * float(scale):.3g}). More calibration tokens than {len(A)} inputs would avoid it",
            RankDeficientWarning,
            stacklevel=2,
        )
    result: Tensor = L
    return result
