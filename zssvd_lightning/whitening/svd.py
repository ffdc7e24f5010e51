"""Thin singular value decomposition of a matrix of any rank, in the time of an eigendecomposition.

Shapes: Z (m, n), r = min(m, n); U (m, r), sigma (r,) and Vh (r, n), with `Z = U diag(sigma) Vh`.
"""

import torch
from torch import Tensor

from zssvd_lightning._numerics import add_square, in_float64

ACCURATE = 3e-5
"""Ratio of singular values over which one eigendecomposition of a Gram matrix in float64 gives orthonormal vectors.

The eigenvectors diagonalize the Gram matrix up to about `5e-16 sigma_1^2`. Two left vectors, both of singular values
above `ACCURATE sigma_1`, are therefore orthogonal up to about 6e-7, at worst.
"""


NEGLIGIBLE = 1e-13
"""Ratio to the largest singular value below which others are rounding errors of float64, and are set to 0."""


def thin_svd(Z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the thin SVD of a finite Z (m, n) of any rank.

    For float32, use eigenvectors of the smaller of `Z^T Z` and `Z Z^T` in float64. This is faster than
    bidiagonalization in float32, and small singular values are accurate to the last digit; see `_svd_by_squares`. For
    other types, use divide and conquer. If that does not converge, which can happen for valid finite matrices, retry on
    the transpose in float64.

    Returns:
        U (m, r), sigma (r,) in descending order and Vh (r, n), with the type and device of Z.

    Raises:
        torch.linalg.LinAlgError: the retry did not converge either, or Z is not finite.
    """
    if Z.dtype == torch.float32 and (found := _svd_by_squares(Z)) is not None:
        return found
    try:
        U, sigma, Vh = torch.linalg.svd(Z, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        V, sigma, Uh = (part.to(Z) for part in torch.linalg.svd(in_float64(Z).T, full_matrices=False))
        U, Vh = Uh.T, V.T
    return U, sigma, Vh


def _svd_by_squares(Z: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Compute the SVD from eigenvectors V of Gram matrices in float64, using `Z V = U diag(sigma)`.

    V is orthonormal for any rank, and the columns of `Z V` are exact. Rounding of the Gram matrix, which holds squares,
    leaves the short ones among them at an angle. The columns longer than `ACCURATE` times the longest give U. The
    others, without their parts along U (below `1e-11 sigma_1`, while Z is rounded to `6e-8 sigma_1`), form a smaller
    matrix, of which the same is done until no column is left that is longer than `NEGLIGIBLE`. Any orthonormal vectors
    serve for those.

    Return None if an eigendecomposition fails or Z is not finite.
    """
    wide = Z.shape[0] < Z.shape[1]
    rest, basis, floor = in_float64(Z.T if wide else Z), None, 0.0
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    while rest.shape[1]:
        try:
            _, Q = torch.linalg.eigh(_gram(rest))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            return None
        US, V = rest @ Q, Q if basis is None else basis @ Q
        del rest, basis, Q  # they are as large as Z
        sigma = US.norm(dim=0)
        longest = float(sigma.max())
        if not longest < float("inf"):
            return None
        floor = floor or NEGLIGIBLE * longest
        if longest > floor:
            short = (sigma <= ACCURATE * sigma[-1]).nonzero()  # eigenvalues ascend
            k = int(short[-1]) + 1 if len(short) else 0
            U = US[:, k:].div_(sigma[k:])
        else:
            k, sigma, U = 0, torch.zeros_like(sigma), _completion([U for U, _, _ in found], US)
        found.append((U, sigma[k:], V[:, k:]))
        rest, basis = US[:, :k], V[:, :k]
        for U, _, _ in found:
            rest.sub_(U @ (U.T @ rest))
    sigma, order = torch.cat([sigma for _, sigma, _ in found]).sort(descending=True, stable=True)
    U = torch.cat([U.to(Z) for U, _, _ in found], 1)[:, order]
    V = torch.cat([V.to(Z) for _, _, V in found], 1)[:, order]
    return (V, sigma.to(Z), U.T) if wide else (U, sigma.to(Z), V.T)


def _gram(Z: Tensor) -> Tensor:
    """Return `Z^T Z` (n, n)."""
    total = Z.new_zeros(Z.shape[1], Z.shape[1])
    add_square(total, Z)
    return total


def _completion(found: list[Tensor], like: Tensor) -> Tensor:
    """Return orthonormal columns (m, s), orthogonal to the orthonormal columns in `found`, in the shape of `like`."""
    m, s = like.shape
    U = torch.cat([like.new_empty(m, 0), *found], 1)
    columns = torch.eye(m, U.shape[1] + s, dtype=like.dtype, device=like.device)[:, U.shape[1] :]
    return torch.ormqr(*torch.geqrf(U), columns) if U.shape[1] else columns
