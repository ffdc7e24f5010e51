"""Experts that run over rows sorted by expert: each matrix of a layer in one pass, everything between them at once.

Shapes: E experts, n hidden features, N tokens, K experts for each token, S = N K rows, m outputs of a matrix, k its
rank. Imports only torch and transformers, so that a saved folder can contain a copy of this file.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from zssvd_lightning.layers.base import HOOKS, CompressedLinear
from zssvd_lightning.layers.low_rank import LowRankLinear
from zssvd_lightning.layers.pivoted import PivotedLinear, is_plain
from zssvd_lightning.layers.pivoted_columns import ColumnPivotedLinear

Products = Callable[[Sequence[nn.Module], Tensor], Tensor]
"""Function that returns the products (S, m) of sorted rows (S, n) with the matrices of their experts.

It is called with the layers of all experts and the rows. Products of rows without an expert are any numbers.
"""

Form = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Weights by which `_product` knows a layer: those that read and write, an order, and a bias."""


def sorted_forward(
    experts: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    products_by: Callable[[Tensor], Products],
) -> Tensor:
    """Map the tokens (N, n) to (N, n) as `ExpertList.forward` does, with rows that are sorted by expert once.

    Args:
        experts: the list of experts.
        hidden_states: tokens (N, n).
        top_k_index: experts of each token (N, K).
        top_k_weights: their weights (N, K).
        products_by: function that returns how to multiply, given the end of the rows of each expert (E,).
    """
    every, each = experts.experts, top_k_index.shape[1]
    count, chosen = len(every), top_k_index.flatten()
    numbers, order = torch.where(chosen < 0, count, chosen).clamp(max=count).sort(stable=True)
    ends = torch.searchsorted(numbers, torch.arange(count, device=numbers.device), right=True)
    products = products_by(ends)
    wide = products([expert.first for expert in every], hidden_states[order // each])
    found = products([expert.down_proj for expert in every], experts.activation(wide))
    if experts.has_post_expert_norm:
        found = experts.post_expert_norm(found)
    found = (found * top_k_weights.flatten()[order, None]).masked_fill(numbers[:, None] == count, 0.0)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return found[back].view(len(hidden_states), each, found.shape[1]).sum(1).to(hidden_states.dtype)


def by_layers(ends: Tensor, every: bool) -> Products:
    """Return how to multiply by calling the layer of each expert on its rows.

    Args:
        ends: end of the rows of each expert (E,).
        every: True to call layers without rows too, so that their gradients are zero.
    """
    stops = ends.tolist()
    starts = [0, *stops[:-1]]

    def products(layers: Sequence[nn.Module], rows: Tensor) -> Tensor:
        found = [
            layer(rows[start:stop])
            for layer, start, stop in zip(layers, starts, stops, strict=True)
            if every or stop > start
        ]
        if not found or stops[-1] < len(rows):
            like = found[0] if found else rows
            found.append(like.new_zeros(len(rows) - stops[-1], _outputs(layers[0])))
        return found[0] if len(found) == 1 else torch.cat(found)

    return products


def by_operator(ends: Tensor) -> Products:
    """Return how to multiply by one operator for all experts, into which `torch.compile` does not look."""

    def products(layers: Sequence[nn.Module], rows: Tensor) -> Tensor:
        weights = [weight for layer in layers for weight in weights_of(layer)]
        kinds = [kind_of(layer) for layer in layers]
        found: Tensor = expert_products(rows, ends, weights, kinds, _outputs(layers[0]))  # type: ignore[arg-type]
        return found

    return products


def can_use_operator(experts: Any, hidden_states: Tensor) -> bool:
    """Return True if `by_operator` computes what the layers do: plain weights, no gradients and no autocast."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled(hidden_states.device.type):
        return False
    return all(kind_of(layer) is not None for expert in experts.experts for layer in (expert.first, expert.down_proj))


def kind_of(layer: nn.Module) -> int | None:
    """Return the place of a layer in `KINDS`, which is its last for a removed one; None if it has none."""
    if isinstance(layer, CompressedLinear) and layer.kind == "removed":
        return len(KINDS)
    if type(layer) not in KINDS or not all(map(is_plain, layer.children())) or is_hooked(layer):
        return None
    return KINDS.index(type(layer))


def weights_of(layer: nn.Module) -> Form:
    """Return the weights of a layer with a `kind_of`."""
    own: Any = layer
    if isinstance(layer, CompressedLinear) and layer.kind == "removed":
        return None, None, None, None
    if isinstance(layer, nn.Linear):
        return layer.weight, None, None, layer.bias
    if isinstance(layer, LowRankLinear):
        return own.down.weight, own.up.weight, None, own.up.bias
    if isinstance(layer, PivotedLinear):
        return own.pivots.weight, None if own.others is None else own.others.weight, own.order, own.bias
    mixing = None if own.mixing is None else own.mixing.weight
    return mixing, own.columns.weight, own.order, own.columns.bias


@torch.library.custom_op("zssvd_lightning::expert_products", mutates_args=())
def expert_products(rows: Tensor, ends: Tensor, weights: list[Tensor | None], kinds: list[int], outputs: int) -> Tensor:
    """Return the products (S, m) of sorted rows (S, n) with the matrices of their experts.

    Args:
        rows: rows sorted by expert.
        ends: end of the rows of each expert (E,).
        weights: those of each expert in turn; see `weights_of`.
        kinds: kind of each layer, a place in `KINDS`.
        outputs: m.
    """
    found, start = rows.new_zeros(len(rows), outputs), 0
    for number, (stop, kind) in enumerate(zip(ends.tolist(), kinds, strict=True)):
        if stop > start:
            if kind == len(KINDS):
                raise RuntimeError(CHOSEN)
            first, last, order, bias = weights[4 * number : 4 * number + 4]
            found[start:stop] = _product(KINDS[kind], rows[start:stop], first, last, order, bias)
        start = stop
    return found


@expert_products.register_fake
def _shape_of_products(
    rows: Tensor, ends: Tensor, weights: list[Tensor | None], kinds: list[int], outputs: int
) -> Tensor:
    return rows.new_empty(len(rows), outputs)


def _product(
    kind: type[nn.Module], x: Tensor, first: Any, last: Tensor | None, order: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Return what a layer of a kind with these weights returns for x (t, n)."""
    if kind is ColumnPivotedLinear:
        x = x if order is None else x.index_select(1, order)
        z = x if first is None else torch.addmm(x[:, : len(first)], x[:, len(first) :], first.t())
        return linear(z, last, bias)
    if kind is not PivotedLinear:
        return linear(x, first, bias) if last is None else linear(linear(x, first), last, bias)
    z = linear(x, first)
    y = z if last is None else torch.cat([z, linear(z, last)], 1)
    y = y if order is None else y.index_select(1, order)
    return y if bias is None else y + bias


def is_hooked(module: nn.Module) -> bool:
    """Return True if a call of a module runs more than the forward method of its class."""
    own = vars(module)
    return "forward" in own or any(own[kind] for kind in HOOKS)


def _outputs(layer: nn.Module) -> int:
    """Return the number of outputs m of a layer, or of the layer that an adapter wraps."""
    return int(layer.out_features)


CHOSEN = (
    "the router has chosen an expert that was removed. NaN logits can cause this; otherwise the router was replaced or "
    "its forward overridden: call zssvd_lightning.layers.apart.removed.forget_removed(model)"
)
"""Error where a token reaches a removed expert."""

KINDS: list[type[nn.Module]] = [nn.Linear, LowRankLinear, PivotedLinear, ColumnPivotedLinear]
"""Kinds of layers that `expert_products` knows."""
