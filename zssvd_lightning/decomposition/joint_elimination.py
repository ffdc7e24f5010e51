"""Pivoted elimination of several matrices at once, in one order of their rows.

Shapes: hidden width h; matrix M_i (h, k_i), with k_1 <= k_2 <= ...; coefficients C_i (h - k_i, k_i) of the rows that
are no pivots of matrix i.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from zssvd_lightning._numerics import add_square
from zssvd_lightning.errors import PivotError

AT_ONCE = 128
"""Largest number of rows that are chosen between two updates of the matrices."""

POOL = 4
"""Number of rows among which a group of rows is chosen, as a multiple of the size of the group."""

LEAF = 256
"""Width up to which a triangular matrix is inverted."""

SHIFT = 8.0
"""First shift of the diagonal of a Gram matrix, relative to the diagonal and in units of rounding."""

FLOOR = 1e-4
"""Distance from the rows before it below which a row counts as dependent on them, in units of `h^-1/2`: the size of a
row of an orthonormal column."""

LOSS = 1e-6
"""Part of the squared distance of a row that must be left within a group. Gram matrices in float32 do not show less."""


def eliminated(matrices: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return an order of the rows whose first k_i are pivots of matrix i, and the coefficients of the others.

    The next row is the one whose distances from the span of the rows before it have the largest product over the
    matrices that are not complete yet, in coordinates in which the columns of each matrix are orthonormal. For one
    matrix this is QR with column pivoting. Rows are chosen in groups, from the rows that are farthest before each
    group. Reflections then turn the span of a group into the next coordinates, and the coefficients of all rows are
    updated, both by products of large matrices: about `1.5 h k_i^2` multiply-adds for matrix i.

    Args:
        matrices: M_i (h, k_i) in the type of the work, k_i ascending. If the rank of one is below k_i, its
            coefficients by the pivots beyond the rank are 0.

    Returns:
        The order (h,) of the rows, and C_i (h - k_i, k_i) for each matrix; both on the device of the matrices.

    Raises:
        PivotError: no row is independent of the rows before it in all matrices that are not complete yet.
    """
    X = [_orthonormal(matrix) for matrix in matrices]
    h, ranks, tiny = len(X[0]), [part.shape[1] for part in X], torch.finfo(X[0].dtype).tiny
    order = torch.arange(h, device=X[0].device)
    t = 0  # rows of X[i][t:] are coefficients by the t pivots so far, then coordinates of the rest
    while True:
        distances = {i: torch.linalg.vector_norm(X[i][t:, t:], dim=1) for i, rank in enumerate(ranks) if rank > t}
        for i in [i for i, left in distances.items() if not left.max() > FLOOR * h**-0.5]:
            X[i][:, t:], ranks[i] = 0.0, t
            del distances[i]
        if not distances:
            return order, [part[part.shape[1] :] for part in X]
        size = min(AT_ONCE, *(ranks[i] - t for i in distances))
        farness = torch.stack([left.clamp(min=tiny).log() for left in distances.values()]).sum(0)
        pool = farness.topk(min(h - t, POOL * size)).indices
        grams = [rows @ rows.T for rows in (X[i][t:, t:][pool] for i in distances)]
        picked = pool[_farthest(grams, size, FLOOR**2 / h)] + t
        if not len(picked):
            shapes = [tuple(matrix.shape) for matrix in matrices]
            raise PivotError(f"matrices of shapes {shapes} have no common order of rows with {t + 1} pivots or more")
        places, rows = _moves(t, picked)
        for part in [order, *X]:
            part[places] = part[rows]
        for i in distances:
            _advance(X[i], t, len(picked))
        t += len(picked)


def _orthonormal(M: Tensor) -> Tensor:
    """Return the rows of M (h, k) in coordinates in which its columns are orthonormal, but for rounding.

    Directions that M lacks, but for rounding, become short. They cost no accuracy of the others.
    """
    gram = M.new_zeros(M.shape[1], M.shape[1])
    add_square(gram, M)
    gram = gram.double()
    sizes = gram.diagonal().sqrt()
    sizes = torch.where(sizes > 0, sizes, torch.ones_like(sizes))
    gram /= sizes[:, None] * sizes
    shift = SHIFT * torch.finfo(M.dtype).eps
    while True:
        gram.diagonal().add_(shift)
        root, failed = torch.linalg.cholesky_ex(gram, upper=True)
        if not failed or not shift < 1:
            return _over_upper(M.clone(), root * sizes)
        shift *= 10


def _over_upper(B: Tensor, U: Tensor) -> Tensor:
    """Compute `B U^-1` in place for B (m, k) and an upper triangular U (k, k), and return B.

    In float32 this takes two thirds of the time of a triangular solver of BLAS, since it consists of larger products.
    """
    k = len(U)
    if k <= LEAF:
        unit = torch.eye(k, dtype=U.dtype, device=U.device)
        return B.copy_(B @ torch.linalg.solve_triangular(U, unit, upper=True).to(B))
    half = k // 2
    _over_upper(B[:, :half], U[:half, :half])
    B[:, half:].addmm_(B[:, :half], U[:half, half:].to(B), alpha=-1)
    _over_upper(B[:, half:], U[half:, half:])
    return B


def _farthest(grams: Sequence[Tensor], size: int, floor: float) -> Tensor:
    """Return at most `size` indices, each with the largest product of the squared distances left there.

    The choice ends where the best row is at a squared distance of at most `floor` in a matrix, or has lost so much of
    it that rounding may have changed the rest.

    Args:
        grams: Gram matrices (p, p) of the rows of each matrix.
        size: number of rows to choose.
        floor: smallest squared distance.
    """
    G = np.stack([gram.double().cpu().numpy() for gram in grams])
    before = G.diagonal(0, 1, 2).copy()
    left, picked = before.copy(), list[int]()
    roots = np.zeros((size, *left.shape))  # of the Gram matrices, as far as they are eliminated
    for step in range(size):
        products = np.log(np.maximum(left, np.finfo(left.dtype).tiny)).sum(0)
        products[picked] = -np.inf
        best = int(products.argmax())
        pivots = left[:, best]
        if (pivots <= np.maximum(floor, LOSS * before[:, best])).any():
            break
        column = G[:, :, best] - np.einsum("sip,si->ip", roots[:step], roots[:step, :, best])
        roots[step] = column / np.sqrt(pivots)[:, None]
        left -= roots[step] ** 2
        picked.append(best)
    return torch.tensor(picked, dtype=torch.long, device=grams[0].device)


def _moves(t: int, picked: Tensor) -> tuple[Tensor, Tensor]:
    """Return places and the rows to be put there, so that the rows `picked` (s,) come to the places from t on."""
    end = t + len(picked)
    displaced = torch.ones(len(picked), dtype=torch.bool, device=picked.device)
    displaced[picked[picked < end] - t] = False
    rows = torch.cat([picked, displaced.nonzero().flatten() + t])
    return torch.cat([torch.arange(t, end, device=picked.device), picked[picked >= end]]), rows


def _advance(X: Tensor, t: int, size: int) -> None:
    """Make the rows t to t + size of X (h, k) pivots, in place, by which the rows after them have coefficients."""
    pivots, others = X[t : t + size], X[t + size :]
    packed, tau = torch.geqrf(pivots[:, t:].double().T)
    V = packed.tril(-1)
    V.diagonal().fill_(1)
    upper = (V.T @ V).triu(1)  # the product of the reflections is I - V (upper + diag(1 / tau))^-1 V^T
    upper.diagonal().copy_(1 / tau.clamp(min=torch.finfo(X.dtype).tiny))  # 0 for a reflection that does nothing
    rest = others[:, t:]
    turned = rest @ torch.linalg.solve_triangular(upper, V, upper=True, left=False).to(X)
    rest.addmm_(turned, V.T.to(X), alpha=-1)
    triangle = packed[:size].triu().T.contiguous()  # coordinates of the pivots
    unit = torch.eye(size, dtype=triangle.dtype, device=triangle.device)
    by_new = others[:, t : t + size] @ torch.linalg.solve_triangular(triangle, unit, upper=False).to(X)
    others[:, :t].addmm_(by_new, pivots[:, :t], alpha=-1)
    others[:, t : t + size] = by_new
