"""One order of a hidden width that begins with pivots for every layer that meets in it.

Shapes: hidden width h; matrix M_i (h, k_i), whose rows depend on each other as the rows (or columns) of layer i do;
coefficients C_i (h - k_i, k_i) of the other rows.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from zssvd_lightning._numerics import exact_products
from zssvd_lightning.decomposition.joint_elimination import eliminated
from zssvd_lightning.errors import PivotError
from zssvd_lightning.layers.pivots import coefficients, column_norms

GAIN = 1.2
"""Smallest growth of the product of all volumes for which two rows are exchanged."""

AT_ONCE = 64
"""Largest number of exchanges between two updates of the matrices."""

SWEEPS = 100
"""Largest number of rounds of exchanges. A few are enough; this bounds the time."""

ROWS_AT_ONCE = 256
"""Number of rows whose coefficients are searched, or checked, at a time, which bounds the memory."""

PROBES = 8
"""Number of random combinations of the coefficients by which those in float32 are checked."""

ACCURATE = 0.05
"""Largest error of a row of coefficients, as the probes estimate it, up to which they are used."""


class NestedPivots(NamedTuple):
    """One order of rows, whose first k_i are pivots of matrix i."""

    order: Tensor
    """Order of the rows (h,), int64, on the CPU."""
    largest: float
    """Largest absolute coefficient of a row by the pivots, over all matrices."""


def nested_order(matrices: Sequence[Tensor]) -> Tensor:
    """Return the order (h,) of `nested_pivots`, with its arguments and errors."""
    return nested_pivots(matrices).order


@torch.no_grad()
def nested_pivots(matrices: Sequence[Tensor]) -> NestedPivots:
    """Return one order of the rows, whose first k_i rows are good pivots of matrix i, for all i at once.

    Pivots are good if their volume, the absolute determinant of these rows of M_i, is large: exchanging pivot r for row
    s multiplies it by `|C_i[s, r]|` (Goreinov et al., How to find a good submatrix, 2010). The sets of pivots are
    nested, so that one exchange may change several of them. A pivoted elimination of all matrices at once gives a
    first order. Then rows are exchanged while the product of all volumes grows by a factor of more than `GAIN`.

    The work is done in float32, and its coefficients are compared with those of the matrices in float64 by random
    combinations. If they differ, as they may for matrices that nearly lack full rank, it is done again in float64.

    Args:
        matrices: M_i (h, k_i) with `1 <= k_i <= h`, of finite values, in any order.

    Raises:
        ValueError: the matrices have no common number of rows, or k_i is not between 1 and h.
        PivotError: there is no order in which the first k_i rows span all rows of matrix i, for every i.
    """
    M = sorted((matrix.detach() for matrix in matrices), key=lambda matrix: matrix.shape[1])
    shapes = [tuple(matrix.shape) for matrix in M]
    if not M or any(h != shapes[0][0] or not 1 <= k <= h for h, k in shapes):
        raise ValueError(f"matrices of shapes {shapes} have no common order of rows")
    device = "cpu" if M[0].device.type == "mps" else M[0].device  # MPS has no float64
    M = [matrix.to(device) for matrix in M]
    with exact_products():
        try:
            order, C = _pivots_in(torch.float32, M)
            found = max(_largest(part, matrix, order) for part, matrix in zip(C, M, strict=True))
            if found < float("inf"):
                return NestedPivots(order, found)
        except (PivotError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
            pass
        try:
            order, _ = _pivots_in(torch.float64, M)
            exact = [coefficients(matrix, order) for matrix in M]
        except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            raise PivotError(f"matrices of shapes {shapes}: {error}") from error
    return NestedPivots(order, max(float(C.abs().max()) if C.numel() else 0.0 for C in exact))


def _pivots_in(dtype: torch.dtype, M: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return the order of the rows (h,), on the CPU, and the coefficients C_i in the type of the work."""
    order, C = eliminated([matrix.to(dtype) for matrix in M])
    order = order.cpu()
    for _ in range(SWEEPS):
        pairs = _exchanges(C, len(order))
        if not pairs:
            break
        _exchange(C, order, pairs)
    return order, C


def _largest(C: Tensor, M: Tensor, order: Tensor) -> float:
    """Return a bound of the absolute coefficients of M (h, k) in an order, or infinity if C is not accurate.

    The bound is the largest of C (h - k, k), plus its largest error in a row. To estimate it, pivots P and other rows Q
    are multiplied by `P^-1 Y` with Gaussian Y: `Q P^-1 Y - C Y` has the size of the error, times that of Y. Infinity is
    also returned if P counts as singular, so that `coefficients` would have to choose among the pivots.
    """
    k, order = C.shape[1], order.to(C.device)
    Y = torch.randn(k, PROBES, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(C.device)
    LU, swaps, failed = torch.linalg.lu_factor_ex(M[order[:k]].double())
    if failed or (LU.diagonal().abs() <= column_norms(M) * len(M) * torch.finfo(torch.float64).eps).any():
        return float("inf")
    solved, largest, error = torch.linalg.lu_solve(LU, swaps, Y), 0.0, 0.0
    for part, rows in zip(torch.split(C, ROWS_AT_ONCE), torch.split(order[k:], ROWS_AT_ONCE), strict=True):
        if not len(rows):
            continue
        wrong = M[rows].double() @ solved - part.double() @ Y
        error = max(error, float(wrong.norm(dim=1).nan_to_num(nan=float("inf")).max()) / PROBES**0.5)
        largest = max(largest, float(part.abs().max()))
    return largest + error if error <= ACCURATE else float("inf")


def _exchanges(C: Sequence[Tensor], h: int) -> list[tuple[int, int]]:
    """Return disjoint pairs of positions, the first before the second, whose exchange increases the product of volumes.

    The gain of each pair is that after the exchange of the pairs before it.
    """
    best, rows = _best_partners(C, h)
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


def _best_partners(C: Sequence[Tensor], h: int) -> tuple[Tensor, Tensor]:
    """Return the largest gain (k,) of an exchange of each pivot for a later row, and the position of that row."""
    k, first = max(part.shape[1] for part in C), min(part.shape[1] for part in C)
    best, rows = C[0].new_zeros(k), torch.zeros(k, dtype=torch.long, device=C[0].device)
    for start in range(first, h, ROWS_AT_ONCE):
        end = min(start + ROWS_AT_ONCE, h)
        gains = C[0].new_ones(end - start, k)
        for part in C:
            pivots = part.shape[1]
            if (begin := max(start, pivots)) < end:
                gains[begin - start :, :pivots] *= part[begin - pivots : end - pivots].abs()
        most, at = gains.max(0)
        rows = torch.where(most > best, at + start, rows)
        best = torch.maximum(most, best)
    return best.cpu(), rows.cpu()


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
