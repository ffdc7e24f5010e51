"""Checks of what a selection rule returns."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from zssvd_lightning.errors import ConfigError
from zssvd_lightning.selection.budget import Budget
from zssvd_lightning.selection.components import Components, Selection
from zssvd_lightning.selection.removals import Removal, removed_in


def checked(
    selection: Any,
    matrices: Mapping[str, Components],
    budget: Budget,
    rule: str,
    removals: Collection[Removal] = (),
) -> Selection:
    """Return the selection of a rule.

    Args:
        selection: what the rule returned.
        matrices: components that the rule chose from, by layer name.
        budget: budget that the rule had to meet.
        rule: name of the rule, for error messages.
        removals: experts that the rule could remove.

    Raises:
        ConfigError: it is no `Selection` of these matrices, or it exceeds the budget. The message names the rule.
    """
    if not isinstance(selection, Selection):
        raise ConfigError(f"selection {rule!r} returned {type(selection).__name__}, but must return a Selection")
    for part, names in (("kept", selection.kept), ("drifts", selection.drifts)):
        if differing := sorted(names.keys() ^ matrices.keys()):
            raise ConfigError(f"{part} of selection {rule!r} must name all layers and no other; see {differing[:3]}")
    if selection.eight_bit and not (budget.chooses_bits and selection.eight_bit <= matrices.keys()):
        raise ConfigError(f"selection {rule!r} chose bits, but storage {budget.storage!r} leaves no such choice")
    removed = removed_in({name: selection.rank(name) for name in matrices}, removals)
    for name, kept in selection.kept.items():
        if kept is not None and name not in removed:
            wrong = _wrong(name, kept, len(matrices[name].sigma), budget, eight_bit=name in selection.eight_bit)
            if wrong is not None:
                raise ConfigError(f"selection {rule!r} returned {_shown(kept)} for {name}, but {wrong}")
    narrower = selection.narrower(budget.shapes)
    if low_rank := [name for name in narrower if selection.kept[name] is not None]:
        raise ConfigError(f"selection {rule!r} gives {low_rank[0]} a rank and another width; it can have one of them")
    cost = budget.kept({name: selection.rank(name) for name in matrices}, selection.eight_bit, narrower)
    if cost > budget.allowed and not budget.planned:
        raise ConfigError(
            f"selection {rule!r} keeps {cost:,} of {budget.total:,} {budget.unit}, but prune_ratio "
            f"{budget.prune_ratio} allows {budget.allowed:,}"
        )
    return selection


def _wrong(name: str, kept: Any, components: int, budget: Budget, *, eight_bit: bool) -> str | None:
    if not isinstance(kept, Tensor) or kept.dtype != torch.int64 or kept.ndim != 1:
        return "it must be a tensor of indices (k,), int64, or None for a dense layer"
    if len(kept) and (kept[0] < 0 or kept[-1] >= components or bool((kept.diff() <= 0).any())):
        return f"indices must be ascending and below {components}"
    return None if budget.planned else _wrong_rank(name, len(kept), budget, eight_bit=eight_bit)


def _wrong_rank(name: str, rank: int, budget: Budget, *, eight_bit: bool) -> str | None:
    if rank < budget.floor(name):
        return f"its lowest rank is {budget.floor(name)}"
    if rank % (step := budget.step(name)):
        return f"with rank_multiple {budget.rank_multiple} its rank must be a multiple of {step}"
    if not budget.is_low_rank(name, rank, eight_bit=eight_bit):
        highest = budget.highest_rank(name, eight_bit=eight_bit)
        return f"above rank {highest} it is larger than dense; return None for a dense layer"
    return None


def _shown(kept: Any) -> str:
    return f"{len(kept)} indices" if isinstance(kept, Tensor) and kept.ndim == 1 else f"{type(kept).__name__}"
