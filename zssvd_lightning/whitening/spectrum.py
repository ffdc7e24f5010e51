"""A weight as a sum of components, largest first, and what the loss would say to dropping each.

Shapes: W and G (m, n), r = min(m, n); left (m, r), sigma (r,), right (r, n) with `W = left diag(sigma) right`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from zssvd_lightning._numerics import in_float64
from zssvd_lightning.whitening.cholesky import Whitening

SMALLEST_BY_SQUARE = 1e-7
"""Singular value relative to the largest, from which on all of them are found by a square in float64."""


@dataclass(frozen=True)
class Spectrum:
    """The SVD `R^T W L = U diag(sigma) V^T` brought back to the coordinates of W."""

    left: Tensor
    """`R^-T U` (m, r)."""
    sigma: Tensor
    """Singular values (r,) of the whitened weight, descending."""
    right: Tensor
    """`V^T L^-1` (r, n)."""

    @classmethod
    def of(cls, W: Tensor, whitening: Whitening, G: Tensor | None = None, length: float = 0.0) -> "Spectrum":
        """Whitened spectrum of W (m, n), in float32 or, for a float64 weight, float64.

        Args:
            W: the weight.
            whitening: coordinates of the metric.
            G: gradient (m, n) that the weight first goes along, as the metric has it: the whitened one.
            length: how far, as a multiple of that; see `correction.natural_lengths`.
        """
        W = W.to(torch.promote_types(W.dtype, torch.float32))
        Z = whitening.whiten(W)
        if G is not None:
            Z = Z + length * whitening.whiten_gradient(G.to(Z))
        U, sigma, Vh = thin_svd(Z)
        return cls(whitening.unwhiten_left(U), sigma, whitening.unwhiten_right(Vh))

    def sensitivities(self, G: Tensor) -> Tensor:
        """First-order change of the loss (r,) when each component is dropped alone, signed.

        `delta_i = -<G, sigma_i left_i right_i>`, which is `-sigma_i u_i^T H v_i` with `H = R^-1 G L^-T`
        (arXiv 2602.02848).
        """
        return -self.sigma * (self.left * (G.to(self.left.dtype) @ self.right.T)).sum(0)

    def squared_derivatives(self, X: Tensor, D: Tensor) -> Tensor:
        """`sum_t (u_i^T R^-1 d_t x_t^T L^-T v_i)^2` (r,), over inputs X (T, n) and gradients D (T, m) by the outputs.

        Their mean is the diagonal of the Fisher information in the coordinates of the spectrum, each token standing
        alone; it is 1 where A and B tell all (EK-FAC, arXiv 1806.03884).
        """
        return ((D @ self.left) * (X @ self.right.T)).square().sum(0)

    def factors(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Factors up (m, k) and down (k, n) of the components `kept` (k,), each with the square root of sigma."""
        root = self.sigma[kept].sqrt()
        return self.left[:, kept] * root, root[:, None] * self.right[kept]

    def to(self, device: torch.device | str) -> "Spectrum":
        """The same on another device."""
        return Spectrum(self.left.to(device), self.sigma.to(device), self.right.to(device))


def thin_svd(Z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, r), sigma (r,) and Vh (r, n) of a finite Z (m, n), whose type and device they have.

    In float32 it is found from the smaller of `Z^T Z` and `Z Z^T` in float64, which takes less time than
    bidiagonalisation in float32 and has small singular values right to the last digit. Otherwise, and where rank is
    lacking, by divide and conquer; where that does not converge, which happens to finite matrices without a fault of
    theirs, it is tried on the transposed in float64.

    Raises:
        torch.linalg.LinAlgError: that did not converge either, or Z is not finite.
    """
    if Z.dtype == torch.float32 and (found := _svd_by_square(Z)) is not None:
        return found
    try:
        U, sigma, Vh = torch.linalg.svd(Z, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        V, sigma, Uh = (part.to(Z) for part in torch.linalg.svd(in_float64(Z).T, full_matrices=False))
        U, Vh = Uh.T, V.T
    return U, sigma, Vh


def _svd_by_square(Z: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """The SVD from eigenvectors V of the smaller square, since the columns of `Z V` are those of `U diag(sigma)`.

    None where one of them is so short that rounding of the square would leave it at no right angle to the others.
    """
    wide = Z.shape[0] < Z.shape[1]
    tall = in_float64(Z.T if wide else Z)
    try:
        _, V = torch.linalg.eigh(tall.T @ tall)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None
    US = tall @ V
    del tall  # as large as Z in float64
    lengths = US.norm(dim=0)
    sigma, order = lengths.sort(descending=True)
    if not sigma[-1] > SMALLEST_BY_SQUARE * sigma[0]:
        return None
    U, sigma, V = US.div_(lengths).to(Z)[:, order], sigma.to(Z), V.to(Z)[:, order]
    return (V, sigma, U.T) if wide else (U, sigma, V.T)
