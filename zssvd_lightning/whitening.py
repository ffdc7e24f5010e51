"""Metrics: the coordinates in which a truncation's error is what it does to the output.

Shapes: W (m, n), A (n, n), L (n, n) lower triangular with `A + eps I = L L^T`.
"""

import warnings
from collections.abc import Callable, Mapping
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
    jitter: float = 0.0
    """What was added to A's diagonal, relative to its mean, to make it positive definite."""

    def whiten(self, W: Tensor) -> Tensor:
        """`W L` (m, n)."""
        if self.L is None:
            return W
        whitened: Tensor = W @ self.L.to(W)
        return whitened

    def whiten_gradient(self, G: Tensor) -> Tensor:
        """`H = G L^-T` (m, n), the gradient by the whitened weight."""
        if self.L is None:
            return G
        solved: Tensor = torch.linalg.solve_triangular(self.L.T.to(G), G, upper=True, left=False)
        return solved

    def unwhiten(self, Vh: Tensor) -> Tensor:
        """`Vh L^-1` (r, n), by a triangular solve."""
        if self.L is None:
            return Vh
        solved: Tensor = torch.linalg.solve_triangular(self.L.to(Vh), Vh, upper=False, left=False)
        return solved


def no_whitening(moments: Moments, name: str) -> Whitening:
    """Plain SVD: the error of a truncation is `||W - W_k||_F`."""
    return Whitening(None)


def input_whitening(moments: Moments, name: str) -> Whitening:
    """By the input second moment (SVD-LLM, arXiv 2403.07378; ZS-SVD, arXiv 2602.02848): the error is the output's."""
    return Whitening(*safe_cholesky(moments.second_moment(name), name))


METRICS: dict[str, Callable[[Moments, str], Whitening]] = {"input": input_whitening, "none": no_whitening}


def safe_cholesky(A: Tensor, name: str) -> tuple[Tensor, float]:
    """Lower triangular L (n, n), float64, with `L L^T = A + eps I`, and eps relative to the mean diagonal of A.

    eps starts at 0 and grows tenfold until the factorisation succeeds.

    Raises:
        NotPositiveDefiniteError: a tenth of the mean diagonal was not enough.
    """
    A = (A.cpu() if A.device.type == "mps" else A).double()  # there is no float64 on MPS
    scale = A.diagonal().mean()
    jitter = 0.0
    while scale > 0 and jitter <= LAST_JITTER:
        shifted = A.clone() if jitter else A
        shifted.diagonal().add_(jitter * scale)
        L, failed = torch.linalg.cholesky_ex(shifted)
        if not failed:
            return L, jitter
        jitter = max(FIRST_JITTER, jitter * 10)
    raise NotPositiveDefiniteError(
        f"the input second moment of {name} {tuple(A.shape)} is not positive definite even with jitter {LAST_JITTER} "
        f"of its mean diagonal {scale:.3g}; its inputs may be all zero: calibrate on other batches, or add it to ignore"
    )


def warn_of_jitter(by_layer: Mapping[str, float]) -> None:
    """One RankDeficientWarning for all layers whose second moment was singular, with the jitter of each."""
    jitters = {name: jitter for name, jitter in by_layer.items() if jitter}
    if jitters:
        few = ", ".join(f"{name} {jitter:.0e}" for name, jitter in list(jitters.items())[:5])
        warnings.warn(
            f"layers with a singular input second moment: {len(jitters)}. Each got jitter, relative to its mean "
            f"diagonal: {few}{', ...' if len(jitters) > 5 else ''}. Before the first truncation, calibrate on more "
            "tokens; after it, inputs of low rank are to be expected behind low-rank layers",
            RankDeficientWarning,
            stacklevel=2,
        )
