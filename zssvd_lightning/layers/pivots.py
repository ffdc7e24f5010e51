"""Choice of pivots: k rows of a matrix of rank k that express all other rows with small coefficients.

Shapes: W (m, n) of rank k, up (m, k), down (k, n), coefficients C (m - k, k). The rows of `W = up down` have the same
linear dependencies as the rows of `up`, and its columns the same as the columns of `down`. Imports only torch, so that
a saved folder can contain a copy of this file.
"""

import logging
from typing import NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

BOUND = 1.05
"""Largest absolute coefficient that is left. A smaller bound takes more exchanges, which lower all coefficients and so
the errors of rounding them."""


CANDIDATES = 128
"""Number of rows among which pivots are exchanged before all coefficients are updated."""


EXCHANGES = 10
"""Limit of the number of exchanges, as a multiple of the rank."""


LINES_AT_ONCE = 256
"""Number of rows or columns that are reduced at a time. For all at once, torch takes several times as long."""


class Pivots(NamedTuple):
    """Rows of `up` that express all others: `up[order[k:]] = coefficients @ up[order[:k]]`."""

    order: Tensor
    """Row indices (m,), int64, the k pivots first; both parts are sorted."""
    coefficients: Tensor
    """C (m - k, k), float64 unless converted."""

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Pivots":
        """Return the pivots on a device, with coefficients of another type."""
        return Pivots(self.order.to(device), self.coefficients.to(device, dtype))


def pivots_first(up: Tensor) -> Tensor:
    """Return the order (m,) of the rows of `up` (m, k) that starts with the pivots; see `choose_pivots`."""
    return choose_pivots(up).order


@torch.no_grad()
def choose_pivots(up: Tensor) -> Pivots:
    """Choose k rows of `up` that express the others with coefficients of at most `BOUND`.

    Elimination with row pivoting, `up[rows] = [L1; L2] U`, gives first pivots, with `C = L2 L1^-1`. Pivots are then
    exchanged for the rows with the largest coefficients, which multiplies the volume `|det up_pivots|` by the
    coefficient each time (Goreinov et al., "How to find a good submatrix", 2010). If the rank r of `up` is below k, r
    pivots span all rows, and the coefficients of the other pivots are 0.

    Args:
        up: factor (m, k) with `k <= m`, of finite values. The work is done in float64 on its device, or on the CPU for
            devices without float64. It takes about `2 m k^2` multiply-adds.

    Returns:
        The pivots, on the device of the work. A warning is logged if exchanges stop at their limit.
    """
    A = _scaled(up)
    m, k = A.shape
    if m == k:
        return Pivots(torch.arange(m, device=A.device), A.new_zeros(0, k))
    rows, C, smallest = _eliminated(A)
    r = k
    if smallest <= _tolerance(A):
        U, S, _ = torch.linalg.svd(A, full_matrices=False)
        r = int((S / S.max() > _tolerance(A)).sum())
        rows, C, _ = _eliminated(U[:, :r])
    rows, C = _exchanged(rows, C)
    if r < k:
        C = torch.cat([C[k - r :], C.new_zeros(m - k, k - r)], 1)
    pivots, others = rows[:k].argsort(), rows[k:].argsort()
    C = C.T.index_select(0, pivots).index_select(1, others).T  # LAPACK leaves C transposed
    return Pivots(torch.cat([rows[:k][pivots], rows[k:][others]]), C)


@torch.no_grad()
def coefficients(up: Tensor, order: Tensor) -> Tensor:
    """Return the coefficients C (m - k, k) for given pivots: `up[order[k:]] = C up[order[:k]]`.

    Args:
        up: factor (m, k).
        order: row indices (m,), the pivots first. If they are linearly dependent, the coefficients of those that add
            nothing to the others are 0.

    Returns:
        C in float64, on the device on which `choose_pivots` works.

    Raises:
        ValueError: the first k rows do not span the others.
    """
    A = _scaled(up)
    k = A.shape[1]
    A = A[order.to(A.device)]
    pivots, others = A[:k], A[k:]
    if not len(others):
        return others
    LU, swaps, _ = torch.linalg.lu_factor_ex(pivots)
    if LU.diagonal().abs().min() > _tolerance(A):
        C: Tensor = torch.linalg.lu_solve(LU, swaps, others, left=False)
        return C
    U, S, _ = torch.linalg.svd(pivots)
    r = int((S / S.max() > _tolerance(A)).sum())
    rows, within = _eliminated(U[:, :r])[:2]
    independent = _exchanged(rows, within)[0][:r]
    C = others.new_zeros(len(others), k)
    if r:
        C[:, independent] = torch.linalg.lstsq(pivots[independent].T, others.T).solution.T
    if (C @ pivots - others).norm() > others.norm() * _tolerance(A) ** 0.5:
        raise ValueError(f"the first {k} rows of the order have rank {r} and do not span the others; choose other rows")
    return C


def column_norms(A: Tensor) -> Tensor:
    """Return the Euclidean norms (k,) of the columns of A (m, k), in float64."""
    total = A.new_zeros(A.shape[1], dtype=torch.float64)
    for part in torch.split(A, LINES_AT_ONCE):
        total += part.double().square().sum(0)
    return total.sqrt()


def _largest(C: Tensor) -> Tensor:
    """Return the largest absolute value of each row of C (m, k), which LAPACK leaves transposed in memory."""
    return torch.stack([part.abs().amax(1) for part in torch.split(C, LINES_AT_ONCE, dim=1)]).amax(0)


def _scaled(up: Tensor) -> Tensor:
    """Return `up` in float64 with columns of norm 1, which changes no dependency of rows."""
    A = up.detach().cpu() if up.device.type == "mps" else up.detach()  # MPS has no float64
    A = A.to(torch.float64, copy=True)
    sizes = column_norms(A)
    A /= torch.where(sizes > 0, sizes, torch.ones_like(sizes))
    return A


def _tolerance(A: Tensor) -> float:
    return max(A.shape) * torch.finfo(A.dtype).eps


def _eliminated(A: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return the rows of A (m, k), pivots of the elimination first, their coefficients, and the smallest pivot."""
    k = A.shape[1]
    LU, swaps, _ = torch.linalg.lu_factor_ex(A)
    rows = list(range(len(A)))
    for at, other in enumerate(swaps.tolist()):  # counted from 1
        rows[at], rows[other - 1] = rows[other - 1], rows[at]
    C = torch.linalg.solve_triangular(LU[:k], LU[k:], upper=False, left=False, unitriangular=True)
    smallest = float(LU.diagonal().abs().min()) if k else 1.0
    return torch.tensor(rows, device=A.device), C, smallest


def _exchanged(rows: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Exchange pivots in place until no coefficient exceeds `BOUND`; return rows, pivots first, and coefficients.

    Exchanges are carried out among a few rows at a time. If they replace the pivots J, and T (J, k) are the
    coefficients of the new ones, then the coefficients of all rows become `C - C_J T_J^-1 (T - I_J)`.
    """
    k = C.shape[1]
    left = EXCHANGES * k
    while C.numel():
        largest = _largest(C)
        found = largest.topk(min(CANDIDATES, len(C)))
        if not (found.values > BOUND).any():
            break
        tried = found.indices  # also rows just below the bound, which exchanges may lift above it
        if left <= 0:
            logger.warning("the exchange of pivots stopped with coefficients of up to %.1f", float(largest.max()))
            break
        inside, outside, count = _exchanges(C[tried], left)
        left -= count
        unit = torch.eye(k, dtype=C.dtype, device=C.device)
        before, names = torch.cat([unit, C[tried]]), torch.cat([rows[:k], rows[k:][tried]])
        J = (inside != torch.arange(k, device=C.device)).nonzero()[:, 0]
        T = before[inside[J]]
        C[tried] = before[outside]
        C.addmm_(C[:, J], torch.linalg.solve(T[:, J], T - unit[J]), alpha=-1)
        rows[:k], rows[k + tried] = names[inside], names[outside]
    return rows, C


def _exchanges(C: Tensor, limit: int) -> tuple[Tensor, Tensor, int]:
    """Exchange pivots for rows of C (b, k), the largest coefficient first, at most `limit` times.

    Returns:
        What is in the places of the k pivots and of the b rows afterwards, as indices into the pivots and then the
        rows, and the number of exchanges.
    """
    b, k = C.shape
    inside, outside, count = list(range(k)), list(range(k, k + b)), 0
    while count < limit:
        i, j = divmod(int(C.abs().argmax()), k)
        largest = float(C[i, j])
        if abs(largest) <= BOUND:
            break
        row = C[i] / largest  # the new pivot by the old ones, over the coefficient of the pivot it replaces
        step = row.clone()
        step[j] -= 1 / largest
        C -= torch.outer(C[:, j], step)
        C[i], C[i, j] = -row, 1 / largest
        inside[j], outside[i] = outside[i], inside[j]
        count += 1
    return torch.tensor(inside, device=C.device), torch.tensor(outside, device=C.device), count
