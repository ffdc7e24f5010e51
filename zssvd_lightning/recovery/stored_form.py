"""Factors in place of pivots while a layer trains, and pivots again afterward.

Shapes: W (m, n) of rank k, up (m, k), down (k, n), pivot rows (k, n), pivot columns (m, k).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from zssvd_lightning.distributed import Team
from zssvd_lightning.layers.base import carry_hooks
from zssvd_lightning.layers.low_rank import LowRankLinear
from zssvd_lightning.layers.pivoted import PivotedLinear, PivotForm
from zssvd_lightning.layers.pivoted_columns import ColumnPivotedLinear
from zssvd_lightning.layers.pivots import Pivots, choose_pivots, coefficients

LARGEST = 10.0
"""Largest coefficient by which the pivots of a common order may express the other rows or columns after training."""


@torch.no_grad()
def factors_of(layer: PivotedLinear | ColumnPivotedLinear) -> LowRankLinear:
    """Return the same weight as `up = U sqrt(S)` and `down = sqrt(S) V^T`, from the singular value decomposition of W.

    Both sides of each component then have equal norms, and the components are orthogonal.

    Args:
        layer: whole layer of k pivots, without an adapter.
    """
    W = layer.weight.detach().double()
    if isinstance(layer, PivotedLinear):
        basis = torch.linalg.qr(layer.pivots.weight.double().T).Q  # (n, k), of the row space
        U, S, Vh = torch.linalg.svd(W @ basis, full_matrices=False)
        Vh = Vh @ basis.T
    else:
        basis = torch.linalg.qr(layer.columns.weight.double()).Q  # (m, k), of the column space
        U, S, Vh = torch.linalg.svd(basis.T @ W, full_matrices=False)
        U = basis @ U
    new = LowRankLinear.like(layer, rank=layer.rank).to_empty(device=W.device)
    new.fill(U * S.sqrt(), S.sqrt()[:, None] * Vh, layer.bias)
    carry_hooks(new, layer)
    return new


@torch.no_grad()
def pivots_of(
    layer: LowRankLinear, form: type[PivotForm], *, ordered: bool, whole: Callable[[Tensor], Tensor], team: Team
) -> PivotForm:
    """Return a layer of pivots with the same weight, flags, training mode and hooks. Collective.

    Args:
        layer: layer of two factors, without an adapter.
        form: class of the new layer.
        ordered: False to take the first k rows or columns as pivots, as layers with a common order do. If those express
            the others only with large coefficients, other pivots are chosen and their order is stored.
        whole: function that returns the full parameter for this process's part of it.
        team: the processes of the run. The first one chooses the pivots, because others may round differently.
    """
    up, down = whole(layer.up.weight), whole(layer.down.weight)
    bias = None if layer.bias is None else whole(layer.bias)
    basis = form.basis(up, down)
    stored, pivots = team.decide_on_first(lambda: _choice(basis, ordered))
    new = form.like(layer, rank=layer.rank, ordered=stored).to_empty(device=up.device)
    new.fill(up, down, bias, pivots.order, pivots.coefficients)
    carry_hooks(new, layer)
    return new


def _choice(basis: Tensor, ordered: bool) -> tuple[bool, Pivots]:
    """Return whether an order is stored, and the pivots among the rows of `basis`, on the CPU."""
    if not ordered:
        first = torch.arange(len(basis))
        try:
            C = coefficients(basis, first)
        except ValueError:
            C = basis.new_full((1, 1), torch.inf)
        if not C.numel() or C.abs().max() <= LARGEST:
            return False, Pivots(first, C.cpu())
    pivots = choose_pivots(basis)
    return True, Pivots(pivots.order.cpu(), pivots.coefficients.cpu())
