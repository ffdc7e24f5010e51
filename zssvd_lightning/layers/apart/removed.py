"""What is left of experts that were removed: layers without numbers, and a router that does not choose them.

Shapes: E experts, n hidden features, N tokens, K experts for each token. Imports only torch and transformers, so that a
saved folder can contain a copy of this file.
"""

from collections.abc import Collection, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from zssvd_lightning.layers.apart.experts import ExpertList, expert_lists
from zssvd_lightning.layers.base import CompressedLinear


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
            raise RuntimeError(
                "the router has chosen an expert that was removed. If its logits are not NaN, its hooks were taken "
                "off; call zssvd_lightning.layers.apart.removed.forget_removed(model)"
            )
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
    """Hooks of a router that keep it from choosing removed experts, so that tokens go to the next best ones.

    A router with a number for each expert that it adds before the choice (a bias) runs with the lowest number for those
    removed. Any other runs with the rows of the remaining experts alone, and what it chooses is numbered as before. The
    parameters themselves do not change.

    Args:
        removed: numbers of the removed experts.
        count: E, number of all experts.
    """

    def __init__(self, removed: Collection[int], count: int) -> None:
        self.removed, self.count = sorted(removed), count
        self._kept = torch.tensor([number for number in range(count) if number not in removed], device="cpu")
        self._whole: dict[str, Tensor] = {}

    def before(self, router: nn.Module, args: Any = None) -> None:
        """Give the router the tensors with which it forgets, until `after`."""
        self._whole = _of_each_expert(router, self.count)
        biased = has_bias(router, self.count)
        for name, value in self._whole.items():
            self._kept = self._kept.to(value.device)
            if not biased:
                _put(router, name, value.index_select(0, self._kept))
            elif value.ndim == 1:
                _put(router, name, lowered(value, self.removed))

    def after(self, router: nn.Module, args: Any, output: Any) -> Any:
        """Put the tensors back, and return the output (logits, weights and numbers) for all experts."""
        for name, value in self._whole.items():
            _put(router, name, value)
        self._whole = {}
        if output is None or has_bias(router, self.count):
            return output
        logits, weights, places = output
        lowest = logits.new_full((*logits.shape[:-1], self.count), torch.finfo(logits.dtype).min)
        return lowest.index_copy(-1, self._kept, logits), weights, self._kept[places]


def run_without(router: nn.Module, removed: Collection[int], count: int, x: Tensor) -> Any:
    """Return the output of a router for the tokens x (N, n) without the removed ones of E experts and without hooks."""
    hooks = Forgetting(removed, count)
    output = None
    hooks.before(router)
    try:
        output = router.forward(x)
    finally:
        output = hooks.after(router, (x,), output)
    return output


def forgotten_by(router: nn.Module) -> list[int]:
    """Return the numbers of the experts that the hooks of a router keep it from choosing."""
    return next((hooks.removed for _, hooks in _forgettings(router)), [])


def forget(router: nn.Module, removed: Collection[int], count: int) -> None:
    """Keep a router from choosing the removed ones of E experts, and let it choose all others again."""
    for key, hooks in list(_forgettings(router)):
        del router._forward_pre_hooks[key]  # noqa: SLF001
        for after in [k for k, hook in router._forward_hooks.items() if getattr(hook, "__self__", None) is hooks]:  # noqa: SLF001
            del router._forward_hooks[after]  # noqa: SLF001
            router._forward_hooks_always_called.pop(after, None)  # noqa: SLF001
    if removed:
        hooks = Forgetting(removed, count)
        router.register_forward_pre_hook(hooks.before)
        # first, so that other hooks see the logits of all experts
        router.register_forward_hook(hooks.after, prepend=True, always_call=True)


def forget_removed(model: nn.Module) -> None:
    """Keep every router of a model from choosing experts whose layers are removed, and from no others.

    Routers beside stacked experts choose all.

    Raises:
        ValueError: experts of a list are removed, but there is no router beside it.
    """
    for module in model.modules():
        if forgotten_by(module):
            forget(module, (), 0)
    for name, experts in expert_lists(model):
        removed, count = removed_from(experts), len(experts.experts)
        router = router_beside(model, name, count)
        if router is not None:
            forget(router, removed, count)
        elif removed:
            raise ValueError(f"experts of {name} are removed, but no router beside it has a row for each expert")


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
    own = chain(router._parameters.items(), router._buffers.items())  # noqa: SLF001
    return {name: value for name, value in own if value is not None and value.ndim and len(value) == count}


def _put(router: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor in place of a parameter or buffer."""
    own: dict[str, Any] = router._parameters if name in router._parameters else router._buffers  # noqa: SLF001
    own[name] = value


def _forgettings(router: nn.Module) -> Iterator[tuple[int, Forgetting]]:
    """Yield the hooks of a router that make it forget, with their key among the hooks before its forward pass."""
    for key, hook in router._forward_pre_hooks.items():  # noqa: SLF001
        if isinstance(hooks := getattr(hook, "__self__", None), Forgetting):
            yield key, hooks
