"""Weights of all experts of a layer in stacks, over which grouped products run.

The weights of experts stay parameters of their layers: their memory becomes that of the stacks, whose rest is zero. So
a change of a parameter in place is one of the stack. A parameter that has got other memory is noticed on the next call.

Experts whose layers are of the same kinds and of similar ranks form a group, which has stacks of its own.

Shapes: E experts of a group, n inputs, m outputs, k rank, K largest rank in the group, t rows. Imports only torch and
transformers, so that a saved folder can contain a copy of this file.
"""

from collections.abc import Callable, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from zssvd_lightning.layers.base import CompressedLinear
from zssvd_lightning.layers.low_rank import LowRankLinear
from zssvd_lightning.layers.pivoted import PivotedLinear, is_plain
from zssvd_lightning.layers.pivoted_columns import ColumnPivotedLinear

MOST_PADDING = 1.25
"""Largest size of the stacks of a group, relative to that of its weights."""

STEP = 8
"""Sizes of stacks are multiples of it, because grouped products need rows that begin at multiples of 16 bytes."""

WATCHED = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Attributes in which a module stores hooks that run when it is called."""

PARTS = {
    LowRankLinear: ("down", "up"),
    PivotedLinear: ("pivots", "others"),
    ColumnPivotedLinear: ("mixing", "columns"),
}
"""Names of the thin layers in the order in which they run, by kind of layer."""

TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types of weights that grouped products take."""

grouped_mm: Callable[..., Tensor] | None = getattr(torch.nn.functional, "grouped_mm", None)
"""Product of groups of rows with a matrix for each; None before torch 2.10."""


class Matrices:
    """One matrix of every expert of a group: `y = W x + b` for the rows of each.

    Args:
        layers: their layers, all of one kind.
        watch: what notes the weights that get the memory of stacks.
    """

    def __init__(self, layers: Sequence[nn.Module], watch: "Watch") -> None:
        self._watch, self.kind = watch, type(layers[0])
        thin = [_thin_layers(layer) for layer in layers]
        self.weights = [self._stack(part, "weight") for part in zip(*thin, strict=True)]
        owners = [layer if self.kind is PivotedLinear else parts[-1] for layer, parts in zip(layers, thin, strict=True)]
        self.bias = None if owners[0].bias is None else self._stack(owners, "bias")
        self.places = self._places(layers) if self.kind in (PivotedLinear, ColumnPivotedLinear) else None

    def __call__(self, x: Tensor, ends: Tensor, numbers: Tensor) -> Tensor:
        """Return the products (t, m) of rows (t, n), given the end of those of each expert and the expert of each."""
        first, last = self.weights[0], self.weights[-1]
        places = None if self.places is None else self.places[numbers]
        if places is not None and self.kind is ColumnPivotedLinear:
            x, rank = x.gather(1, places), first.shape[1]
            y = _product(x[:, :rank] + _product(x[:, rank:], first, ends), last, ends)
        elif places is not None:
            z = _product(x, first, ends)
            y = torch.cat([z, _product(z, last, ends)], 1).gather(1, places)
        else:
            y = _product(x, first, ends)
            y = y if first is last else _product(y, last, ends)
        return y if self.bias is None else y + self.bias[numbers]

    def _stack(self, modules: Sequence[nn.Module], name: str) -> Tensor:
        """Return a stack of parameters, whose memory they get."""
        weights: list[Any] = [module._parameters[name] for module in modules]  # noqa: SLF001
        largest = [max(of_one) for of_one in zip(*(weight.shape for weight in weights), strict=True)]
        stack: Tensor = weights[0].new_zeros(len(weights), *(-(-size // STEP) * STEP for size in largest))
        for place, module, weight in zip(stack, modules, weights, strict=True):
            part = place[tuple(slice(size) for size in weight.shape)]
            part.copy_(weight)
            weight.data = part
            self._watch.share(module, name)
        return stack

    def _places(self, layers: Sequence[Any]) -> Tensor:
        """Return where each output is in `[z, C z]` (E, m), or which input is in each place of `[x_1, x_2]`."""
        found = []
        columns, padded = self.kind is ColumnPivotedLinear, self.weights[0].shape[1]
        for layer in layers:
            self._watch.read(layer, "order")
            k, size = layer.rank, layer.in_features if columns else layer.out_features
            order = torch.arange(size, device=self.weights[0].device) if layer.order is None else layer.order.long()
            if columns:
                places = order.new_zeros(padded + self.weights[0].shape[2])
                places[:k], places[padded : padded + size - k] = order[:k], order[k:]
            else:
                places = torch.where(order < k, order, order + padded - k)
            found.append(places)
        return torch.stack(found)


class Watch:
    """Note of everything on which stacks depend."""

    def __init__(self) -> None:
        self._owners: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._objects: list[Any] = []
        self._shared: list[Tensor] = []
        self._addresses: list[tuple[int, torch.Size]] = []
        self._buffers: list[tuple[Tensor, int, int]] = []
        self._hooks: list[Any] = []
        self._modules: list[dict[str, Any]] = []

    def call(self, module: nn.Module) -> None:
        """Note a module that is called plainly, and its children."""
        own = vars(module)
        self._modules.append(own)
        self._hooks += [own[kind] for kind in WATCHED]
        for name, child in module._modules.items():  # noqa: SLF001
            self._note(module._modules, name, child)  # noqa: SLF001

    def share(self, module: nn.Module, name: str) -> None:
        """Note a parameter that has the memory of a stack."""
        weight: Any = module._parameters[name]  # noqa: SLF001
        self._note(module._parameters, name, weight)  # noqa: SLF001
        self._shared.append(weight)
        self._addresses.append((weight.data_ptr(), weight.shape))

    def read(self, module: nn.Module, name: str) -> None:
        """Note a buffer of which a stack holds something else than its values."""
        buffer = module._buffers[name]  # noqa: SLF001
        self._note(module._buffers, name, buffer)  # noqa: SLF001
        if buffer is not None:
            self._buffers.append((buffer, buffer.data_ptr(), buffer._version))  # noqa: SLF001

    def holds(self) -> bool:
        """Return True if everything is as it was noted, but for values of parameters."""
        present = [owner.get(name) for owner, name in zip(self._owners, self._names, strict=True)]
        return (
            all(map(is_, present, self._objects))
            and not any(self._hooks)
            and not any("forward" in own for own in self._modules)
            and [(weight.data_ptr(), weight.shape) for weight in self._shared] == self._addresses
            and all(b.data_ptr() == place and b._version == version for b, place, version in self._buffers)  # noqa: SLF001
        )

    def _note(self, owner: dict[str, Any], name: str, found: Any) -> None:
        self._owners.append(owner)
        self._names.append(name)
        self._objects.append(found)


class Stacks:
    """All weights of a list of experts in stacks.

    Attributes:
        groups: numbers of the experts of each group, with their first and their last matrix.
        places: place of each expert in the order of the groups (E,), and E for no expert.
        removed: numbers of the removed experts, which come after all groups.
    """

    def __init__(self, experts: Sequence[Any], groups: Sequence[Sequence[int]], removed: Sequence[int]) -> None:
        self._watch, self.removed = Watch(), list(removed)
        for expert in experts:
            for module in expert.modules():
                self._watch.call(module)
        with torch.inference_mode(False), torch.no_grad():
            self.groups = [
                (
                    list(group),
                    Matrices([experts[number].first for number in group], self._watch),
                    Matrices([experts[number].down_proj for number in group], self._watch),
                )
                for group in groups
            ]
            device = self.groups[0][1].weights[0].device
            order = [*(number for group in groups for number in group), *removed]
            places = [order.index(number) for number in range(len(experts))]
            self.places = torch.tensor([*places, len(experts)], device=device)

    @classmethod
    def of(cls, experts: Sequence[Any]) -> "Stacks | None":
        """Return the stacks of experts, or None if they have other weights than can be stacked, or none compressed."""
        layers = [layer for expert in experts for layer in expert.children()]
        if grouped_mm is None or not any(isinstance(layer, CompressedLinear) for layer in layers):
            return None
        removed, sizes = list[int](), dict[int, Sizes]()
        for number, expert in enumerate(experts):
            if all(map(_is_removed, expert.children())):
                removed.append(number)
            elif (found := _sizes(expert)) is not None:
                sizes[number] = found
            else:
                return None
        weights = [p for expert in experts for p in expert.parameters()]
        first = next(iter(weights), None)
        if first is None or first.is_meta or first.dtype not in TYPES:
            return None
        if any(p.dtype != first.dtype or p.device != first.device or p.is_inference() for p in weights):
            return None
        return cls(experts, _groups(sizes), removed)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.groups[0][1].weights[0].dtype

    def hold(self) -> bool:
        """Return True if these are the weights of the experts, and nothing but these runs when they are called."""
        return self._watch.holds()


Sizes = tuple[tuple[type[nn.Module], ...], tuple[int, ...]]
"""Kinds of the two layers of an expert, and the sizes of its weights that stacks pad."""


def _sizes(expert: Any) -> Sizes | None:
    """Return kinds and sizes of an expert; None if it has other weights than can be stacked, or hooks."""
    kinds, sizes = [], []
    for layer in (expert.first, expert.down_proj):
        if (type(layer) is not nn.Linear and type(layer) not in PARTS) or is_hooked(layer) or is_hooked(expert):
            return None
        if layer.in_features % STEP or layer.out_features % STEP or not _are_plain(_thin_layers(layer)):
            return None
        kinds.append(type(layer))
        sizes.append(getattr(layer, "rank", 0))
    return tuple(kinds), tuple(sizes)


def _groups(sizes: dict[int, Sizes]) -> list[list[int]]:
    """Return groups of experts of the same kinds, whose ranks are padded to the largest one; see `MOST_PADDING`."""
    groups: list[list[int]] = []
    ordered = sorted(sizes, key=lambda number: (str(sizes[number][0]), sum(sizes[number][1]), number))
    for number in ordered:
        together = [*groups[-1], number] if groups else [number]
        ranks = [sizes[each][1] for each in together]
        padded = len(together) * sum(-(-max(of_one) // STEP) * STEP for of_one in zip(*ranks, strict=True))
        total = sum(-(-rank // STEP) * STEP for own in ranks for rank in own)
        if groups and sizes[groups[-1][0]][0] == sizes[number][0] and padded <= MOST_PADDING * total:
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups


def is_hooked(module: nn.Module) -> bool:
    """Return True if a call of a module runs more than the forward method of its class."""
    own = vars(module)
    return "forward" in own or any(own[kind] for kind in WATCHED)


def _thin_layers(layer: nn.Module) -> list[Any]:
    """Return the layers that hold the weights of a layer, in the order in which they run. A missing one is None."""
    return [getattr(layer, part) for part in PARTS[type(layer)]] if type(layer) in PARTS else [layer]


def _are_plain(thin: Sequence[nn.Module | None]) -> bool:
    """Return True if layers only multiply by weights. Those that were put in columns on purpose stay where they are."""
    return all(part is not None and is_plain(part) and not (len(thin) > 1 and _is_in_columns(part)) for part in thin)


def _is_in_columns(part: Any) -> bool:
    return bool(part.weight.t().is_contiguous() and not part.weight.is_contiguous())


def _is_removed(layer: nn.Module) -> bool:
    return isinstance(layer, CompressedLinear) and layer.kind == "removed"


def _product(x: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    if grouped_mm is None:
        raise RuntimeError("stacks are made only where torch has grouped products")
    return grouped_mm(x, stack.transpose(1, 2), offs=ends)
