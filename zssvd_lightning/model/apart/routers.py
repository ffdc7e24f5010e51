"""Routers of separate experts, and which of their experts a compression may remove.

A router is recognized by its structure, and it is proved that it can do without experts: it is tried on random tokens.
"""

import logging
import math
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zssvd_lightning._contexts import evaluation_mode
from zssvd_lightning.errors import TargetError
from zssvd_lightning.layers.apart.experts import ExpertList, expert_lists
from zssvd_lightning.layers.apart.removed import (
    Routing,
    forget,
    forgotten_by,
    has_bias,
    removed_from,
    router_beside,
    run_without,
)

logger = logging.getLogger(__name__)

SEED, TOKENS = 0, 64

GROUPS = ("num_group", "n_group")
"""Attributes of routers that choose groups of experts first: the number of groups."""


class Routed(NamedTuple):
    """List of experts whose router can do without some of them."""

    name: str
    """Name of the list."""
    layers: tuple[tuple[str, ...], ...]
    """Names of the linear layers of each expert."""
    groups: int
    """Number of groups of equal size, in order, from which the router chooses some first; 1 without groups."""
    least: int
    """Number of experts that must remain in each group."""

    def group_of(self, number: int) -> int:
        """Return the group of an expert."""
        return number * self.groups // len(self.layers)

    def may_go(self, gone: Collection[int]) -> dict[int, int]:
        """Return the experts of which one can go beside those that are gone, and how many of its group can."""
        left = [number for number in range(len(self.layers)) if number not in gone]
        sizes = Counter(map(self.group_of, left))
        spare = {number: sizes[self.group_of(number)] - self.least for number in left}
        return {number: count for number, count in spare.items() if count > 0}

    def experts_in(self, model: nn.Module) -> ExpertList:
        """Return the list itself."""
        return model.get_submodule(self.name)  # type: ignore[return-value]

    def router_in(self, model: nn.Module) -> nn.Module:
        """Return the router."""
        router = router_beside(model, self.name, len(self.layers))
        if router is None:
            raise RuntimeError(f"the router of {self.name} was there when the compression began")
        return router


def removable_experts(model: nn.Module, targets: Collection[str]) -> list[Routed]:
    """Return the lists of experts in a model of which some can be removed, and log the reason for each other list.

    Args:
        model: model whose experts are separate layers.
        targets: names of the layers to compress. An expert can be removed if these include all of its layers.

    Raises:
        TargetError: there is no list of which experts can be removed. The message says why.
    """
    found, wanted = list[Routed](), set(targets)
    left: dict[str, str] = {}
    for name, experts in expert_lists(model):
        names = tuple(
            tuple(f"{name}.{number}.{part}" for part, _ in expert.named_children())
            for number, expert in enumerate(experts.experts)
        )
        if not any(wanted.issuperset(of_one) for of_one in names):
            continue
        tried = _tried(model, name, experts, names)
        if isinstance(tried, Routed):
            found.append(tried)
        else:
            left[name] = tried
    if not found:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(left.items())[:3])
        raise TargetError(
            "remove_experts is set, but the model has no expert that can be removed"
            + (f" ({reasons})" if reasons else ": no stacked experts with all matrices among the layers to compress")
            + "; leave remove_experts out"
        )
    for name, reason in left.items():
        logger.warning("no expert of %s can be removed: %s", name, reason)
    return found


def forget_in(model: nn.Module, routed: Collection[Routed], layers: Collection[str]) -> None:
    """Keep the routers from choosing the experts whose layers are all among `layers` or removed, and no others."""
    for each in routed:
        removed = {*removed_from(model.get_submodule(each.name)), *_removed_by(each, layers)}
        forget(each.router_in(model), removed, len(each.layers))


def _removed_by(routed: Routed, layers: Collection[str]) -> list[int]:
    """Return the numbers of the experts whose layers are all among `layers`."""
    return [number for number, names in enumerate(routed.layers) if all(name in layers for name in names)]


@torch.no_grad()
def _tried(model: nn.Module, name: str, experts: ExpertList, names: tuple[tuple[str, ...], ...]) -> Routed | str:
    """Return the list with what its router needs, or why none of its experts can be removed."""
    router, count, gone = router_beside(model, name, len(names)), len(names), removed_from(experts)
    if router is None:
        return "no module beside them has a row for each expert"
    own = vars(router).get("forward")
    if own is not None and not forgotten_by(router) and getattr(own, "__func__", None) is not type(router).forward:
        return "the forward method of their router was replaced"
    groups = next((int(number) for key in GROUPS if (number := getattr(router, key, None))), 1)
    if groups > 1 and not has_bias(router, count):
        return "their router chooses from groups of equal size, and has no bias by which an expert can be left out"
    weight = next(p for p in router.parameters() if p.ndim == 2)
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(TOKENS, weight.shape[1], generator=generator).to(weight)
    with evaluation_mode(router), torch.autocast(weight.device.type, enabled=False):
        try:
            chosen = _choice(router, gone, count, x)
            top = chosen.shape[1]
            chosen_groups = int(getattr(router, "topk_group", groups))
            least = top if groups == 1 else max(2, math.ceil(top / chosen_groups))  # the best two speak for a group
            routed = Routed(name, names, groups, least)
            tokens = chosen.flatten().bincount(minlength=count).tolist()
            most_chosen = sorted(routed.may_go(gone), key=lambda number: -tokens[number])[:1]
            for removed in (most_chosen, [*_all_but_least(routed, gone)]):
                _choice(router, {*gone, *removed}, count, x)
        except Exception as error:  # noqa: BLE001  modules are of any type
            return f"their router does not run without an expert: {error}"
    return routed


def _choice(router: nn.Module, removed: Collection[int], count: int, x: Tensor) -> Tensor:
    """Return the experts (N, K) that a router chooses without the removed ones.

    Raises:
        ValueError: it is no choice.
    """
    output: Any = run_without(router, removed, count, x)
    if not isinstance(output, tuple) or len(output) != 3 or not all(isinstance(part, Tensor) for part in output):
        raise ValueError("it does not return logits, weights and numbers of experts")
    routing = Routing(*output)
    if tuple(routing.logits.shape) != (len(x), count) or routing.weights.shape != routing.chosen.shape:
        raise ValueError(f"its outputs have shapes {[tuple(part.shape) for part in output]} for {len(x)} tokens")
    every = routing.chosen.sort(1).values
    if bool((every.diff(dim=1) == 0).any()) or int(every.min()) < 0 or int(every.max()) >= count:
        raise ValueError("it chooses an expert twice, or one that there is not")
    if wrong := set(removed) & set(every.flatten().tolist()):
        raise ValueError(f"it still chooses expert {min(wrong)}")
    return routing.chosen


def _all_but_least(routed: Routed, gone: Collection[int]) -> Iterator[int]:
    """Yield the numbers of as many experts as may go, beside those that are gone."""
    taken: Counter[int] = Counter()
    for number, most in routed.may_go(gone).items():
        taken[routed.group_of(number)] += 1
        if taken[routed.group_of(number)] <= most:
            yield number
