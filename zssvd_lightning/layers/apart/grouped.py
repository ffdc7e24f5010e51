"""Convolutions whose channels are in groups, with a linear layer over patches for the matrix of each group.

A convolution with G groups is G convolutions side by side, each from C / G channels of the input to m / G channels of
the output. `GroupedConvolution` holds each of them as an `UnfoldedConvolution`.

Shapes: B images of C channels, m channels of the output. Imports only torch and transformers, so that a saved folder
can contain a copy of this file.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from zssvd_lightning.layers.apart.convolutions import KERNELS, UnfoldedConvolution
from zssvd_lightning.layers.apart.factors import factors_of, has_hooks, runs_alone
from zssvd_lightning.layers.base import carry_hooks, take_over

WIDE = 16
"""Fewest channels to which a convolution on a CPU takes less time by factors than by the dense matrix of a group."""

GROUPS = "channel_groups"
"""Name of the list of convolutions in a `GroupedConvolution`."""


class GroupedConvolution(nn.Module):
    """Convolution that holds the matrix of each group of channels as a linear layer, in place of one with `groups`.

    It computes what the replaced module does. On a CPU, groups run one after the other if their ranks are at least
    `WIDE`. On other devices, and in exported graphs, two convolutions with groups compute them together: one to as many
    channels in each group as the highest rank, and one of size 1 back. If ranks are lower on a CPU, or two convolutions
    would take more products than the dense matrices, one convolution with groups does, by the factors multiplied out.
    Forms in 8 bits, and layers with hooks or adapters, always run one group after the other.

    Args:
        old: the convolution; see `grouped_fault_of`. The matrices share the memory of its weight if that is contiguous,
            and the biases that of its bias.

    Attributes:
        origin: class of the replaced module, whose settings are attributes too.
        channel_groups: the convolution of each group, with its linear layer `kernel_matrix`.

    Example:
        >>> GroupedConvolution(nn.Conv2d(8, 12, 3, groups=4, padding=1))(torch.randn(1, 8, 16, 16)).shape
        torch.Size([1, 12, 16, 16])
    """

    groups: int
    in_channels: int
    kernel_size: tuple[int, ...]
    origin: type[nn.Module]
    channel_groups: nn.ModuleList
    __jit_unused_properties__: ClassVar[list[str]] = ["weight", "bias"]

    def __init__(self, old: nn.Conv1d | nn.Conv2d) -> None:
        super().__init__()
        take_over(self, old)
        self.origin = type(old)
        parts = nn.ModuleList([UnfoldedConvolution(_group_of(old, number)) for number in range(old.groups)])
        for part in parts:
            part.is_group = True  # type: ignore[assignment]
        self.add_module(GROUPS, parts.train(old.training))

    @property
    def weight(self) -> Tensor:
        """Weight (m, C / G, k1, k2) of the convolution, computed at each access. For code that reads it."""
        return torch.cat([part.weight for part in self._parts])

    @property
    def bias(self) -> Tensor | None:
        """Bias (m,), computed at each access, or None."""
        biases = [part.bias for part in self._parts if part.bias is not None]
        return torch.cat(biases) if biases else None

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C, ...) to (B, m, ...), as the replaced convolution does."""
        layers = [part.kernel_matrix for part in self._parts]
        if any(map(has_hooks, self._parts)) or not all(map(runs_alone, layers)):
            return self._one_by_one(x)
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return self.together(x)
        wide = min(getattr(layer, "rank", layer.out_features) for layer in layers) >= WIDE
        return self._one_by_one(x) if wide else self._multiplied_out(x)

    def together(self, x: Tensor) -> Tensor:
        """Map x as `forward` does, by two convolutions with groups if these take fewer products than one."""
        layers = [part.kernel_matrix for part in self._parts]
        m, n = layers[0].out_features, layers[0].in_features
        k = max(getattr(layer, "rank", m) for layer in layers)
        if k * (m + n) >= m * n:
            return self._multiplied_out(x)
        factors = [factors_of(layer) for layer in layers]
        reading = pad_sequence([D for _, D in factors], batch_first=True)
        writing = pad_sequence([U.T for U, _ in factors if U is not None], batch_first=True).transpose(1, 2)
        apply = functional.conv1d if len(self.kernel_size) == 1 else functional.conv2d
        back = writing.reshape(-1, k, *[1] * len(self.kernel_size))
        return apply(self._convolved(x, reading.flatten(0, 1)), back, self.bias, groups=self.groups)

    def _multiplied_out(self, x: Tensor) -> Tensor:
        factors = [factors_of(part.kernel_matrix) for part in self._parts]
        return self._convolved(x, torch.cat([D if U is None else U @ D for U, D in factors]), self.bias)

    def _one_by_one(self, x: Tensor) -> Tensor:
        channels = -len(self.kernel_size) - 1
        inputs = x.chunk(self.groups, channels)
        return torch.cat([part(each) for part, each in zip(self._parts, inputs, strict=True)], channels)

    @torch.no_grad()
    def folded(self, old: nn.Module | None = None) -> nn.Module:
        """Return a convolution of the original class with the present weights. All matrices must be dense.

        Args:
            old: the convolution that was replaced, which then gets the weights; None to create one.
        """
        made = self.empty() if old is None else old
        new: Any = made
        for part, W in zip(self._parts, new.weight.chunk(self.groups), strict=True):
            _write(part.weight, W)
        if new.bias is not None:
            new.bias.copy_(self.bias)
        return made

    def empty(self) -> nn.Module:
        """Return a convolution of the original class, whose weight and bias have no values."""
        new: nn.Module = self.origin.__new__(self.origin)
        nn.Module.__init__(new)
        take_over(new, self, leave_out=("origin",))
        like: Any = self._parts[0].empty()
        for name in ("weight", "bias"):
            value = getattr(like, name)
            if value is not None:
                shape = self.groups * len(value), *value.shape[1:]
                value = nn.Parameter(value.detach().new_empty(shape), requires_grad=value.requires_grad)
            new.register_parameter(name, value)
        return new

    def extra_repr(self) -> str:
        """Return the settings for `print(model)`, as the replaced convolution does."""
        told: str = self.origin.extra_repr(self)
        return told

    @property
    def _parts(self) -> list[UnfoldedConvolution]:
        return list(self._modules[GROUPS]._modules.values())  # type: ignore[union-attr,arg-type]  # noqa: SLF001

    def _convolved(self, x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the convolution by the rows of W (G k, n), of which each group has k."""
        origin: Any = self.origin
        kernels = W.reshape(-1, self.in_channels // self.groups, *self.kernel_size)
        output: Tensor = origin._conv_forward(self, x, kernels, bias)  # noqa: SLF001
        return output


def is_grouped(module: nn.Module) -> bool:
    """Return whether a module is an `nn.Conv1d` or `nn.Conv2d` whose channels are in groups."""
    return type(module) in (nn.Conv1d, nn.Conv2d) and bool(module.groups > 1)  # type: ignore[operator]


def grouped_fault_of(module: nn.Module) -> str | None:
    """Return why the groups of a convolution cannot be separate layers, or why that is of no use; None if they can."""
    own: Any = module
    if not is_grouped(module) or "forward" in vars(module):
        return f"{type(module).__name__} may compute something else than nn.Conv1d or nn.Conv2d, which are supported"
    if type(module._parameters.get("weight")) is not nn.Parameter:  # noqa: SLF001
        return "its weight is computed from other parameters, or spread over processes"
    m, n = len(own.weight) // own.groups, own.weight[0].numel()
    if (m * n - 1) // (m + n) < 1:
        return "its groups have matrices where even rank 1 would not save a parameter, as in depthwise convolutions"
    return None


def parts_of(module: nn.Module) -> list[str]:
    """Return the names that the linear layers of all groups get, relative to the convolution."""
    return [f"{GROUPS}.{number}.{KERNELS}" for number in range(module.groups)]  # type: ignore[arg-type]


def unfold_groups(model: nn.Module, names: Iterable[str]) -> None:
    """Replace the convolutions with groups whose matrices have these names, in place, in all their places."""
    wanted, made = set(names), dict[int, GroupedConvolution]()
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Conv1d, nn.Conv2d)) or grouped_fault_of(module) is not None:
            continue
        if any(f"{name}.{part}" in wanted for part in parts_of(module)):
            made[id(module)] = GroupedConvolution(module)
    for parent in list(model.modules()):
        for leaf, module in list(parent._modules.items()):  # noqa: SLF001  named_children leaves out repeated ones
            if id(module) in made:
                setattr(parent, leaf, made[id(module)])


def grouped(model: nn.Module) -> list[GroupedConvolution]:
    """Return the convolutions whose groups are layers."""
    return [module for module in model.modules() if isinstance(module, GroupedConvolution)]


def _group_of(old: nn.Conv1d | nn.Conv2d, number: int) -> Any:
    """Return one group as a convolution of its own, without hooks, which shares the memory of the weight and bias."""
    new: Any = type(old).__new__(type(old))
    nn.Module.__init__(new)
    take_over(new, old)
    carry_hooks(new, nn.Module())
    new.in_channels, new.out_channels, new.groups = old.in_channels // old.groups, old.out_channels // old.groups, 1
    for name in ("weight", "bias"):
        value: Any = getattr(old, name)
        if value is not None:
            value = nn.Parameter(value.detach().chunk(old.groups)[number], requires_grad=value.requires_grad)
        new.register_parameter(name, value)
    return new


def _write(value: Tensor, place: Tensor) -> None:
    """Write values to a place that does not share their memory."""
    if value.data_ptr() != place.data_ptr() or value.stride() != place.stride():
        place.copy_(value)
