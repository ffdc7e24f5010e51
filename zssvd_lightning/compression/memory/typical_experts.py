"""Experts in a pass over fake tensors, where no router can choose: one expert stands for all.

Shapes: N tokens, K experts for each, E experts, n hidden features.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from zssvd_lightning.calibration.routing.means import experts_beside
from zssvd_lightning.layers.apart.experts import Expert, ExpertList, expert_lists
from zssvd_lightning.layers.apart.removed import router_beside


def let_one_stand_for_all(model: nn.Module) -> None:
    """Send all tokens of each list of experts through its first expert, which takes the work and memory of all.

    Args:
        model: a copy of a model, which is changed.
    """
    for name, experts in expert_lists(model):
        if not experts.repeats:
            experts.forward = partial(_through_the_first, experts)  # type: ignore[method-assign]
            continue
        count = sum(child.isdigit() for child, _ in experts.named_children())  # the others may be empty modules
        each = getattr(router_beside(model, name, count), "top_k", 1)
        rows_of_each = partial(_repeated_through_the_first, experts, count=count, each=int(each))
        experts.forward = rows_of_each  # type: ignore[method-assign]


def all_but_the_first(model: nn.Module) -> list[Expert]:
    """Return the experts after the first of each list."""
    return [expert for _, experts in expert_lists(model) for expert in experts.experts[1:]]


def first_experts(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return, by the name of each layer of the first experts, the names of the same layer of all in its list."""
    return {names[0]: names for names in experts_beside(model).values()}


def shared_rows(rows: Mapping[str, int], firsts: Mapping[str, tuple[str, ...]]) -> dict[str, int]:
    """Return the rows of the layers of all experts, N K / E for each: those of the first, divided and rounded up."""
    return {name: -(-rows[first] // len(names)) for first, names in firsts.items() if first in rows for name in names}


def _through_the_first(
    experts: ExpertList, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Map the tokens (N, n) to (N, n) as `ExpertList` does, with all N K rows in the first expert."""
    count, each = top_k_index.shape
    token = torch.arange(count, device=hidden_states.device).repeat(each)
    place = torch.arange(each, device=hidden_states.device).repeat_interleave(count)
    found = experts.experts[0](hidden_states[token], token, experts.activation)
    if experts.has_post_expert_norm:
        found = experts.post_expert_norm(found)
    found = found * top_k_weights[token, place, None]
    return torch.zeros_like(hidden_states).index_add_(0, token, found.to(hidden_states.dtype))


def _repeated_through_the_first(experts: ExpertList, hidden_states: Tensor, *, count: int, each: int) -> Tensor:
    """Map the repeated tokens (E N, n) to (E N, n) as `ExpertList` does, with N K rows in the first expert.

    Args:
        experts: the list.
        hidden_states: the tokens.
        count: E, number of experts.
        each: K, number of experts of a token.
    """
    token = torch.arange(len(hidden_states) // count * each, device=hidden_states.device)
    found = experts.experts[0](hidden_states[token], token, experts.activation)
    return torch.zeros_like(hidden_states).index_add_(0, token, found.to(hidden_states.dtype))
