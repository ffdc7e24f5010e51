"""One order of a hidden width that begins with pivots for every layer that meets in it.

Shapes: hidden width h; matrix M_i (h, k_i), whose rows depend on each other as the rows (or columns) of layer i do;
coefficients C_i (h - k_i, k_i) of the other rows.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zssvd_lightning._numerics import in_float64
from zssvd_lightning.layers.pivots import coefficients

GAIN = 1.2
"""Smallest growth of the product of all volumes for which two rows are exchanged."""

AT_ONCE = 64
"""Largest number of rows that are chosen, or exchanged, between two updates of the matrices."""

SWEEPS = 100
"""Largest number of rounds of exchanges. A few are enough; this bounds the time."""


def nested_order(matrices: Sequence[Tensor]) -> Tensor:
    """Return one order of the rows, whose first k_i rows are good pivots of matrix i, for all i at once.

    Pivots are good if their volume, the absolute determinant of these rows of M_i, is large: exchanging pivot r for row
    s multiplies it by `|C_i[s, r]|` (Goreinov et al., How to find a good submatrix, 2010). The sets of pivots are
    nested, so that one exchange may change several of them. A pivoted elimination of all matrices at once gives a
    first order. Then rows are exchanged while the product of all volumes grows by a factor of more than `GAIN`.

    Args:
        matrices: M_i (h, k_i) of full column rank, in any order.

    Returns:
        Order of the rows (h,), int64, on the CPU.

    Raises:
        ValueError: the matrices have no common number of rows, or the pivots of one do not span its rows.
    """
    M = sorted((in_float64(matrix.detach()) for matrix in matrices), key=lambda matrix: matrix.shape[1])
    h = len(M[0])
    if any(len(matrix) != h or matrix.shape[1] > h for matrix in M):
        raise ValueError(f"matrices of shapes {[tuple(matrix.shape) for matrix in M]} have no common order of rows")
    order = _eliminated([torch.linalg.qr(matrix).Q for matrix in M])
    C = [coefficients(matrix, order) for matrix in M]
    for _ in range(SWEEPS):
        pairs = _exchanges(C, h)
        if not pairs:
            break
        _exchange(C, order, pairs)
    return order


def _eliminated(Q: Sequence[Tensor]) -> Tensor:
    """Return an order of the rows of orthonormal bases Q_i (h, k_i), by elimination of all of them at once.

    The next row is the one whose distances from the span of the rows before it have the largest product over the
    matrices that are not complete yet. For one matrix this is QR with column pivoting. Rows are chosen in groups, from
    the rows that are farthest before each group.
    """
    h, largest = len(Q[0]), Q[-1].shape[1]
    left = [basis.square().sum(1) for basis in Q]  # squared distances
    L = [torch.zeros_like(basis) for basis in Q]  # Cholesky factors of Q Q^T
    chosen = torch.zeros(0, dtype=torch.long, device=Q[0].device)
    while (t := len(chosen)) < largest:
        active = [i for i, basis in enumerate(Q) if basis.shape[1] > t]
        size = min(AT_ONCE, *(Q[i].shape[1] - t for i in active))
        farness = torch.stack([left[i].clamp(min=torch.finfo(Q[0].dtype).tiny).log() for i in active]).sum(0)
        farness[chosen] = -torch.inf
        pool = farness.topk(min(h - t, 4 * size)).indices
        grams = [Q[i][pool] @ Q[i][pool].T - L[i][pool, :t] @ L[i][pool, :t].T for i in active]
        picked = pool[_farthest(grams, size)]
        for i in active:
            columns = Q[i] @ Q[i][picked].T - L[i][:, :t] @ L[i][picked, :t].T
            root, _ = torch.linalg.cholesky_ex(columns[picked])
            new = torch.linalg.solve_triangular(root.T, columns, upper=True, left=False)
            L[i][:, t : t + size] = new
            left[i] -= new.square().sum(1)
        chosen = torch.cat([chosen, picked])
    others = torch.ones(h, dtype=torch.bool, device=chosen.device)
    others[chosen] = False
    return torch.cat([chosen, others.nonzero().flatten()]).cpu()


def _farthest(grams: Sequence[Tensor], size: int) -> list[int]:
    """Return `size` indices, each with the largest product of the pivots that all Gram matrices have left there."""
    left, picked = np.stack([gram.cpu().numpy() for gram in grams]), list[int]()
    for _ in range(size):
        products = np.log(np.maximum(left.diagonal(0, 1, 2), np.finfo(left.dtype).tiny)).sum(0)
        products[picked] = -np.inf
        best = int(products.argmax())
        picked.append(best)
        pivot = np.maximum(left[:, best, best], np.finfo(left.dtype).tiny)[:, None, None]
        left -= left[:, :, best, None] * left[:, None, best] / pivot
    return picked


def _exchanges(C: Sequence[Tensor], h: int) -> list[tuple[int, int]]:
    """Return disjoint pairs of positions, the first before the second, whose exchange increases the product of volumes.

    The gain of each pair is that after the exchange of the pairs before it.
    """
    gains = C[0].new_ones(h, max(part.shape[1] for part in C))
    for part in C:
        gains[h - len(part) :, : part.shape[1]] *= part.abs()
    best, rows = gains.max(0)
    pairs: list[tuple[int, int]] = []
    used: set[int] = set()  # a row may be a pivot of one matrix and none of another
    for first in best.argsort(descending=True)[: 2 * AT_ONCE].tolist():
        second = int(rows[first])
        if best[first] > GAIN and len(pairs) < AT_ONCE and used.isdisjoint((first, second)):
            pairs.append((first, second))
            used |= {first, second}
    blocks = np.stack([_block(part, pairs) for part in C])
    taken = []
    for index, pair in enumerate(pairs):
        pivots = blocks[:, index, index]
        if abs(pivots.prod()) > GAIN:
            taken.append(pair)
            blocks -= blocks[:, :, index, None] * blocks[:, None, index] / pivots[:, None, None]
    return taken


def _block(C: Tensor, pairs: Sequence[tuple[int, int]]) -> "np.ndarray[Any, np.dtype[Any]]":
    """Return the coefficients of the second rows of pairs by the first; 1 or 0 where an exchange leaves the pivots."""
    firsts, seconds, across = _sides(C, pairs)
    block = torch.eye(len(pairs), dtype=C.dtype, device=C.device)
    places = across.nonzero().flatten()
    block[places[:, None], places] = C[seconds[across][:, None] - C.shape[1], firsts[across]]
    return block.cpu().numpy()


def _sides(C: Tensor, pairs: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first and second positions of pairs, and whether each pair is a pivot of C and another row."""
    firsts, seconds = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(1)
    return firsts, seconds, (firsts < C.shape[1]) & (seconds >= C.shape[1])


def _exchange(C: Sequence[Tensor], order: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
    """Exchange the rows of pairs of positions, in place, in `order` and in all coefficients."""
    both = torch.tensor(pairs)
    order[both] = order[both.flip(1)]
    for part in C:
        k, (firsts, seconds, across) = part.shape[1], _sides(part, pairs)
        pivots, others = both[seconds < k], both[firsts >= k] - k
        part[:, pivots] = part[:, pivots.flip(1)]
        part[others] = part[others.flip(1)]
        R, S = firsts[across], seconds[across] - k  # y_S = C_SR z_R + ... becomes z_R = C_SR^-1 (y_S - ...)
        inverse = torch.linalg.inv(part[S[:, None], R])
        by_new, rows = part[:, R] @ inverse, inverse @ part[S]
        part.addmm_(by_new, part[S], alpha=-1)
        part[:, R], part[S] = by_new, -rows
        part[S[:, None], R] = inverse
