"""Experts that run over rows sorted by expert: each matrix of a layer in one pass.

Shapes: E experts, n hidden features, N tokens, K experts for each token, S = N K rows, m outputs of a matrix. Imports
only torch and transformers, so that a saved folder can contain a copy of this file.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from zssvd_lightning.layers.apart.stacks import Stacks, is_hooked
from zssvd_lightning.layers.base import CompressedLinear
from zssvd_lightning.layers.low_rank import LowRankLinear
from zssvd_lightning.layers.pivoted import PivotedLinear, is_plain
from zssvd_lightning.layers.pivoted_columns import ColumnPivotedLinear

Form = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Weights by which `_product` knows a layer: those that read and write, an order, and a bias."""


def forward_by_operator(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute `ExpertList.forward` without a graph break of `torch.compile`, where `can_use_operator`."""
    every: list[Any] = experts.experts
    places = torch.arange(len(every) + 1, device=top_k_index.device)
    numbers, order = _sorted(top_k_index, places)
    ends = torch.searchsorted(numbers, places[:-1], right=True)
    wide = _by_operator([expert.first for expert in every], hidden_states[order % len(hidden_states)], ends)
    found = _by_operator([expert.down_proj for expert in every], experts.activation(wide), ends)
    return _summed(experts, found, numbers == len(every), order, top_k_weights).to(hidden_states.dtype)


def forward_by_stacks(
    experts: Any, stacks: Stacks, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Compute `ExpertList.forward` with grouped products over stacks that hold the weights of the experts.

    Raises:
        RuntimeError: a token has an expert that was removed.
    """
    count = len(stacks.places) - 1
    numbers, order = _sorted(top_k_index, stacks.places)
    ends = torch.searchsorted(numbers, torch.arange(count, device=numbers.device), right=True)
    stops = [0, *ends.tolist()]
    if stops[count - len(stacks.removed)] < stops[count]:
        raise RuntimeError(CHOSEN)
    tokens, found, place = order % len(hidden_states), list[Tensor](), 0
    for group, first, last in stacks.groups:
        start, stop = stops[place], stops[place + len(group)]
        if start < stop:
            within = (ends[place : place + len(group)] - start).int()
            expert = numbers[start:stop] - place
            inner = experts.activation(first(hidden_states[tokens[start:stop]], within, expert))
            found.append(last(inner, within, expert))
        place += len(group)
    if stops[-1] < len(order):
        found.append(hidden_states.new_zeros(len(order) - stops[-1], hidden_states.shape[1]))
    every = found[0] if len(found) == 1 else torch.cat(found)
    return _summed(experts, every, numbers == count, order, top_k_weights).to(hidden_states.dtype)


def _sorted(top_k_index: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Return the places (S,) of the experts of all rows, sorted, and which row is at each.

    Row `i N + t` is token t for the choice i of its experts.

    Args:
        top_k_index: experts of each token (N, K).
        places: place of each expert, and one for none (E + 1,).
    """
    chosen = top_k_index.T.flatten()
    none = len(places) - 1
    numbers, order = places[torch.where(chosen < 0, none, chosen).clamp(max=none)].sort(stable=True)
    return numbers, order


def _summed(experts: Any, found: Tensor, is_none: Tensor, order: Tensor, top_k_weights: Tensor) -> Tensor:
    """Return the sum over the experts of each token (N, n), given the sorted outputs (S, n) and which are of none."""
    count, each = top_k_weights.shape
    if experts.has_post_expert_norm:
        found = experts.post_expert_norm(found)
    found = (found * top_k_weights.T.flatten()[order, None]).masked_fill(is_none[:, None], 0.0)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return found[back].view(each, count, found.shape[1]).sum(0)


def _by_operator(layers: Sequence[nn.Module], rows: Tensor, ends: Tensor) -> Tensor:
    """Return the products (S, m) of sorted rows (S, n) with the matrices of their experts."""
    weights: Any = [weight for layer in layers for weight in weights_of(layer)]
    kinds: Any = [kind_of(layer) for layer in layers]
    found: Tensor = expert_products(rows, ends, weights, kinds, layers[0].out_features)
    return found


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
    kind: type[nn.Module], x: Tensor, first: Any, last: Any, order: Tensor | None, bias: Tensor | None
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


CHOSEN = (
    "the router has chosen an expert that was removed. NaN logits can cause this; otherwise the router was replaced or "
    "its forward overridden: call zssvd_lightning.layers.apart.removed.forget_removed(model)"
)
"""Error where a token reaches a removed expert."""

KINDS: list[type[nn.Module]] = [nn.Linear, LowRankLinear, PivotedLinear, ColumnPivotedLinear]
"""Kinds of layers that `expert_products` knows."""
