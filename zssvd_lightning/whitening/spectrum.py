"""Whitened spectrum of a weight: its components, largest first, and the sensitivity of the loss to each.

Shapes: W and G (m, n), r = min(m, n); left (m, r), sigma (r,) and right (r, n), with `W = left diag(sigma) right`.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from zssvd_lightning.whitening.cholesky import Whitening
from zssvd_lightning.whitening.svd import thin_svd


class Step(NamedTuple):
    """Step of a whitened weight along its whitened gradient H (m, n)."""

    factor: float
    """Factor t of `t H`."""
    longest: float = math.inf
    """Bound of the Frobenius norm of the step."""

    def along(self, H: Tensor) -> Tensor:
        """Return the step (m, n).

        Example:
            >>> Step(-2.0, longest=5.0).along(torch.tensor([[3.0, 4.0]]))
            tensor([[-3., -4.]])
        """
        length = abs(self.factor) * float(H.norm())
        return H * (self.factor * min(1.0, self.longest / length) if length > 0 else 0.0)

    def shortened(self, part: float) -> "Step":
        """Return `part` of the step, with the bound shortened as well."""
        return Step(part * self.factor, part * self.longest)


NO_STEP = Step(0.0)
"""Step that changes no weight."""


@dataclass(frozen=True)
class Spectrum:
    """SVD `R^T W L = U diag(sigma) V^T`, mapped back to the coordinates of W."""

    left: Tensor
    """Left factors `R^-T U` (m, r)."""
    sigma: Tensor
    """Singular values (r,) of the whitened weight, descending."""
    right: Tensor
    """Right factors `V^T L^-1` (r, n)."""

    @classmethod
    def of(cls, W: Tensor, whitening: Whitening, G: Tensor | None = None, step: Step = NO_STEP) -> "Spectrum":
        """Compute the whitened spectrum of W (m, n), in float32, or in float64 for a float64 weight.

        Args:
            W: weight (m, n).
            whitening: coordinates of the metric.
            G: gradient (m, n). If given, the whitened weight first moves along the whitened gradient
                `H = R^-1 G L^-T`.
            step: length of that move; see `correction.steps.natural_lengths`.
        """
        W = W.to(torch.promote_types(W.dtype, torch.float32))
        Z = whitening.whiten(W)
        if G is not None:
            Z = Z + step.along(whitening.whiten_gradient(G.to(Z)))
        U, sigma, Vh = thin_svd(Z)
        return cls(whitening.unwhiten_left(U), sigma, whitening.unwhiten_right(Vh))

    def sensitivities(self, G: Tensor) -> Tensor:
        """Return the signed first-order change of the loss (r,) from dropping each component alone.

        `delta_i = -<G, sigma_i left_i right_i> = -sigma_i u_i^T H v_i`, with `H = R^-1 G L^-T`
        (arXiv 2602.02848).
        """
        return -self.sigma * (self.left * (G.to(self.left.dtype) @ self.right.T)).sum(0)

    def squared_derivatives(self, X: Tensor, D: Tensor) -> Tensor:
        """Return `sum_t (u_i^T R^-1 d_t x_t^T L^-T v_i)^2` (r,) for inputs X (T, n) and output gradients D (T, m).

        The mean over tokens is the diagonal of the Fisher information in the coordinates of the spectrum, with tokens
        treated as independent. It is 1 where A and B describe the Fisher information exactly (EK-FAC, arXiv
        1806.03884).
        """
        return ((D @ self.left) * (X @ self.right.T)).square().sum(0)

    def factors(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Return up (m, k) and down (k, n) for the component indices `kept` (k,), each scaled by `sqrt(sigma)`."""
        root = self.sigma[kept].sqrt()
        return self.left[:, kept] * root, root[:, None] * self.right[kept]

    def first(self, k: int) -> "Spectrum":
        """Return the k components of the largest singular values, in new tensors if there are more."""
        if k >= len(self.sigma):
            return self
        return Spectrum(self.left[:, :k].clone(), self.sigma[:k].clone(), self.right[:k].clone())

    def to(self, device: torch.device | str) -> "Spectrum":
        """Return this spectrum on another device."""
        return Spectrum(self.left.to(device), self.sigma.to(device), self.right.to(device))
