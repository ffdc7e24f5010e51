"""The two factors of a layer, for modules that apply them in another way than the layer does.

Shapes: W (m, n) of rank k. Imports only torch and transformers, so that a saved folder can contain a copy of this file.
"""

from typing import Any

import torch
from torch import Tensor, nn

from zssvd_lightning.layers.base import HOOKS
from zssvd_lightning.layers.low_rank import LowRankLinear
from zssvd_lightning.layers.pivoted import PivotedLinear
from zssvd_lightning.layers.pivoted_columns import ColumnPivotedLinear

BARE = (nn.Linear, LowRankLinear, PivotedLinear, ColumnPivotedLinear)
"""Layers that another module can stand for, and the thin layers in them."""


def runs_alone(layer: nn.Module) -> bool:
    """Return True if a layer need not be called: it is one of `BARE`, without hooks, adapters, or other methods."""
    return all(map(_is_bare, (layer, *layer.children())))


def has_hooks(module: nn.Module) -> bool:
    """Return whether a module has hooks of its own."""
    return any(getattr(module, kind) for kind in HOOKS)


def factors_of(layer: Any) -> tuple[Tensor | None, Tensor]:
    """Return U (m, k) and D (k, n) with W = U D, for a layer of `BARE`; None and W if it is dense."""
    if isinstance(layer, nn.Linear):
        return None, layer.weight
    if isinstance(layer, LowRankLinear):
        return layer.up.weight, layer.down.weight
    if isinstance(layer, ColumnPivotedLinear):
        return layer.columns.weight, _reading(layer)
    return _writing(layer), layer.pivots.weight


def _reading(layer: ColumnPivotedLinear) -> Tensor:
    """Return the factor (k, n) that reads the input."""
    k, like = layer.rank, layer.columns.weight
    D = torch.eye(k, dtype=like.dtype, device=like.device)
    if layer.mixing is not None:
        D = torch.cat([D, layer.mixing.weight], 1)
    return D if layer.order is None else D.index_select(1, layer.order.argsort())


def _writing(layer: PivotedLinear) -> Tensor:
    """Return the factor (m, k) that writes the output."""
    k, like = layer.rank, layer.pivots.weight
    U = torch.eye(k, dtype=like.dtype, device=like.device)
    if layer.others is not None:
        U = torch.cat([U, layer.others.weight])
    return U if layer.order is None else U.index_select(0, layer.order)


def _is_bare(layer: nn.Module) -> bool:
    plain = type(layer) in BARE and not has_hooks(layer)
    return plain and (torch.compiler.is_compiling() or "forward" not in vars(layer))
