"""Remains of removed experts: layers without numbers, and a router that does not choose them.

Shapes: E experts, n hidden features, N tokens, K experts for each token. Imports only torch and transformers, so that a
saved folder can contain a copy of this file.
"""

import copy
from collections.abc import Collection, Mapping
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from zssvd_lightning.layers.apart.experts import ExpertList, expert_lists
from zssvd_lightning.layers.apart.grouped_experts import CHOSEN
from zssvd_lightning.layers.base import CompressedLinear

REPLICATE = "_replicate_for_data_parallel"
"""Method of modules by which `nn.DataParallel` copies them for each device."""


class RemovedLinear(CompressedLinear):
    """Linear layer of a removed expert, which no token reaches.

    Args:
        in_features: n, size of the input.
        out_features: m, size of the output.
        bias: True if the replaced layer had a bias. It is gone too.

    Attributes:
        removed: buffer of one byte, by which saved weights show that the layer was removed.
    """

    kind = "removed"
    removed: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        self.dtype: torch.dtype = dtype or torch.get_default_dtype()
        self.trainable = True
        self._had_bias = bias
        self.register_buffer("removed", torch.ones(1, dtype=torch.uint8, device=device))

    @classmethod
    def found_in(cls, weights: Mapping[str, Any], name: str) -> dict[str, Any] | None:
        """See `CompressedLinear`."""
        return {} if f"{name}.removed" in weights else None

    @property
    def spec(self) -> dict[str, Any]:
        """See `CompressedLinear`."""
        return {"kind": self.kind}

    @property
    def weight(self) -> Tensor:
        """Zeros (m, n)."""
        return self._zeros(self.out_features, self.in_features)

    @property
    def bias(self) -> Tensor | None:
        """Zeros (m,), or None if the replaced layer had no bias."""
        return self._zeros(self.out_features) if self._had_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map no row (0, n) to none (0, m).

        Raises:
            RuntimeError: there is a row, so the router has chosen a removed expert.
        """
        if x.numel():
            raise RuntimeError(CHOSEN)
        return x.new_zeros(*x.shape[:-1], self.out_features)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.removed.device, requires_grad=bool(self.trainable))

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]


class Routing(NamedTuple):
    """Experts that a router has chosen for N tokens."""

    logits: Tensor
    """Logits (N, E)."""
    weights: Tensor
    """Weights (N, K) of the experts of each token."""
    chosen: Tensor
    """Numbers (N, K) of the experts of each token."""


class Forgetting:
    """Replacement for a router's `forward` that does not choose removed experts, but the next best ones.

    A router with a number for each expert that it adds before the choice (a bias) runs with the lowest number for those
    removed. Any other runs with the rows of the remaining experts alone, and what it chooses is numbered as before. It
    runs as a shallow copy with such tensors, so that the router itself never changes.

    Args:
        removed: numbers of the removed experts.
        count: E, number of all experts.
    """

    def __init__(self, removed: Collection[int], count: int) -> None:
        self.removed, self.count = sorted(removed), count
        self._kept = torch.tensor([number for number in range(count) if number not in removed], device="cpu")

    def __call__(self, router: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Return the output (logits, weights and numbers) of a router for all experts."""
        twin, biased = copy.copy(router), has_bias(router, self.count)
        twin._parameters, twin._buffers = dict(router._parameters), dict(router._buffers)  # noqa: SLF001
        for name, value in _of_each_expert(router, self.count).items():
            if not biased:
                _put(twin, name, value.index_select(0, self._kept.to(value.device)))
            elif value.ndim == 1:
                _put(twin, name, lowered(value, self.removed))
        output = type(router).forward(twin, *args, **kwargs)
        if biased or not isinstance(output, tuple) or len(output) != 3:
            return output  # what is no choice is refused when a compression tries the router
        logits, weights, places = output
        lowest, kept = torch.finfo(logits.dtype).min, self._kept.to(logits.device)
        every = logits.new_full((*logits.shape[:-1], self.count), lowest)
        return every.index_copy(-1, kept, logits), weights, kept[places]


def run_without(router: nn.Module, removed: Collection[int], count: int, x: Tensor) -> Any:
    """Return the output of a router for the tokens x (N, n) without the removed ones of E experts and without hooks."""
    return Forgetting(removed, count)(router, x)


def forgotten_by(router: nn.Module) -> list[int]:
    """Return the numbers of the experts that a router is kept from choosing."""
    own = vars(router).get("forward")
    return own.func.removed if isinstance(own, partial) and isinstance(own.func, Forgetting) else []


def forget(router: nn.Module, removed: Collection[int], count: int) -> None:
    """Keep a router from choosing the removed ones of E experts, and let it choose all others again."""
    if forgotten_by(router):
        for name in ("forward", REPLICATE):
            vars(router).pop(name, None)
    if removed:
        forgetting = Forgetting(removed, count)
        router.forward = partial(forgetting, router)
        setattr(router, REPLICATE, partial(_replica, forgetting, router))


def _replica(forgetting: Forgetting, router: nn.Module) -> nn.Module:
    """Return the copy of a router for one device of `nn.DataParallel`, which goes by its own numbers."""
    replica: nn.Module = type(router)._replicate_for_data_parallel(router)  # type: ignore[no-untyped-call]  # noqa: SLF001
    replica.forward = partial(forgetting, replica)
    return replica


def forget_removed(model: nn.Module) -> None:
    """Keep every router of a model from choosing experts whose layers are removed, and from no others.

    Routers beside stacked experts choose all.

    Raises:
        ValueError: experts of a list are removed, but there is no router beside it. Nothing is changed.
    """
    found: list[tuple[nn.Module, list[int], int]] = []
    for name, experts in expert_lists(model):
        removed, count = removed_from(experts), len(experts.experts)
        router = router_beside(model, name, count)
        if router is not None:
            found.append((router, removed, count))
        elif removed:
            raise ValueError(f"experts of {name} are removed, but no router beside it has a row for each expert")
    for module in model.modules():
        forget(module, (), 0)
    for router, removed, count in found:
        forget(router, removed, count)


def removed_from(experts: nn.Module) -> list[int]:
    """Return the numbers of the removed experts of a list; none for experts that are stacked."""
    every = experts.experts if isinstance(experts, ExpertList) else []
    removed = (all(isinstance(layer, RemovedLinear) for layer in expert.children()) for expert in every)
    return [number for number, gone in enumerate(removed) if gone]


def router_beside(model: nn.Module, name: str, count: int) -> nn.Module | None:
    """Return the module beside the E experts `name` that has a row for each of them, if there is exactly one."""
    parent, _, leaf = name.rpartition(".")
    found = [
        module
        for key, module in model.get_submodule(parent).named_children()
        if key != leaf and any(value.ndim == 2 for value in _of_each_expert(module, count).values())
    ]
    return found[0] if len(found) == 1 else None


def has_bias(router: nn.Module, count: int) -> bool:
    """Return whether a router has a number for each of E experts, which it adds before the choice."""
    return any(value.ndim == 1 for value in _of_each_expert(router, count).values())


@torch.no_grad()
def lower_biases(router: nn.Module, removed: Collection[int], count: int) -> None:
    """Write the lowest number into the biases of the removed ones of E experts, for good."""
    for value in _of_each_expert(router, count).values():
        if value.ndim == 1:
            value.copy_(lowered(value, removed))


def lowered(bias: Tensor, removed: Collection[int]) -> Tensor:
    """Return a bias (E,) with the lowest number of its type for the removed experts."""
    mask = torch.zeros(len(bias), dtype=torch.bool, device="cpu")
    mask[list(removed)] = True
    return bias.masked_fill(mask.to(bias.device), torch.finfo(bias.dtype).min)


def _of_each_expert(router: nn.Module, count: int) -> dict[str, Tensor]:
    """Return the own parameters and buffers of a module whose first side is E."""
    copied = vars(router).get("_former_parameters", {})  # where `nn.DataParallel` holds the parameters of a copy
    own = chain(router._parameters.items(), router._buffers.items(), copied.items())  # noqa: SLF001
    return {name: value for name, value in own if value is not None and value.ndim and len(value) == count}


def _put(router: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor in place of a parameter or buffer."""
    groups: tuple[dict[str, Any], ...] = (router._parameters, router._buffers)  # noqa: SLF001
    next((own for own in groups if name in own), vars(router))[name] = value
