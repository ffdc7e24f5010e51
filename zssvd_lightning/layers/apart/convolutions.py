"""Convolutions as linear layers over patches, so that their weights are compressed like those of linear layers.

A convolution multiplies each patch of its input by one matrix: its weight as (m, n), for m output channels and
`n = C k1 k2` numbers in a patch of C channels. `UnfoldedConvolution` holds that matrix as a linear layer.

Shapes: B images of C channels, P positions of the output. Imports only torch and transformers, so that a saved folder
can contain a copy of this file.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from zssvd_lightning.layers.apart.factors import factors_of, runs_alone
from zssvd_lightning.layers.base import take_over, type_of
from zssvd_lightning.layers.pivoted import PivotedLinear

KERNELS = "kernel_matrix"
"""Name of the linear layer in an `UnfoldedConvolution`."""

PATCH_NUMBERS = 2**22
"""Most numbers in the patches that are in memory at the same time, if one row of positions has no more."""


class UnfoldedConvolution(nn.Module):
    """Convolution that holds its weight as the matrix of a linear layer, in place of an `nn.Conv1d` or `nn.Conv2d`.

    It computes what the replaced module does. A dense matrix is one convolution, and a matrix of rank k is a
    convolution to k channels and one of size 1 back. Forms in 8 bits, and layers with hooks or adapters, multiply the
    patches of the input, a few at a time: those of larger inputs are made again in the backward pass.

    Args:
        old: the convolution; see `fault_of`. The matrix shares the memory of its weight if that is contiguous. The bias
            is the same parameter.

    Attributes:
        origin: class of the replaced module, whose settings are attributes too.
        kernel_matrix: linear layer with weight (m, n), or the compressed layer in its place.
        splits: False to make the patches of all images at once.
        is_group: True for one group of a `GroupedConvolution`.

    Example:
        >>> UnfoldedConvolution(nn.Conv2d(3, 8, 5, padding=2))(torch.randn(1, 3, 16, 16)).shape
        torch.Size([1, 8, 16, 16])
    """

    in_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...] | str
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]
    origin: type[nn.Module]
    kernel_matrix: Any
    splits: bool
    is_group: bool
    __jit_unused_properties__: ClassVar[list[str]] = ["weight", "bias"]

    def __init__(self, old: nn.Conv1d | nn.Conv2d) -> None:
        super().__init__()
        take_over(self, old)
        self.origin, self.splits, self.is_group = type(old), True, False
        layer = nn.Linear(old.weight[0].numel(), len(old.weight), bias=False, device="meta")
        weight = old.weight.data.reshape(len(old.weight), -1)
        layer.weight = nn.Parameter(weight, requires_grad=old.weight.requires_grad)
        layer.bias = old.bias  # type: ignore[assignment]
        self.kernel_matrix = layer.train(old.training)

    @property
    def weight(self) -> Tensor:
        """Weight (m, C, k1, k2) of the convolution, computed at each access. For code that reads it."""
        return self._kernels(self.kernel_matrix.weight)

    @property
    def bias(self) -> Tensor | None:
        """Bias (m,), or None."""
        return self.kernel_matrix.bias  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C, ...) to (B, m, ...), as the replaced convolution does."""
        layer = self.kernel_matrix
        if not runs_alone(layer):
            return self._from_patches(x)
        if isinstance(layer, PivotedLinear):
            return self._by_pivots(x, layer)
        up, down = factors_of(layer)
        if up is None:
            return self._convolved(x, down, layer.bias)
        return self._mixed(self._convolved(x, down), up, layer.bias)

    def _by_pivots(self, x: Tensor, layer: PivotedLinear) -> Tensor:
        """Return the channels of the pivots by a convolution, and the others as combinations of them."""
        channels = -len(self.kernel_size) - 1
        y = self._convolved(x, layer.pivots.weight)
        if layer.others is not None:
            y = torch.cat([y, self._mixed(y, layer.others.weight)], channels)
        if layer.order is not None:
            y = y.index_select(channels, layer.order)
        return y if layer.bias is None else y + layer.bias.to(y.dtype).reshape(-1, *[1] * len(self.kernel_size))

    def positions(self, x: Tensor) -> tuple[int, ...]:
        """Return the size (P,) or (P1, P2) of the output for an input x (..., C, ...)."""
        around = self._around()
        pads = [sum(around[2 * i : 2 * i + 2]) for i in reversed(range(len(self.kernel_size)))]
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        lengths = x.shape[-len(self.kernel_size) :]
        return tuple((n + p - r) // s + 1 for n, p, r, s in zip(lengths, pads, reach, self.stride, strict=True))

    def _around(self) -> list[int]:
        """Return the padding before and after each dimension, the last one first, as `functional.pad` takes it."""
        if self.padding_mode != "zeros":
            return self._reversed_padding_repeated_twice
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        if isinstance(self.padding, str):
            pairs = [(r // 2, r - r // 2) if self.padding == "same" else (0, 0) for r in reach]
        else:
            pairs = [(p, p) for p in self.padding]  # which may have changed since the module was made
        return [side for pair in reversed(pairs) for side in pair]

    def folded(self, old: nn.Module | None = None) -> nn.Module:
        """Return a convolution of the original class with the present weights. The matrix must be dense.

        Args:
            old: the convolution that was replaced, which then gets the weights; None to create one.
        """
        made = self.empty() if old is None else old
        new: Any = made
        W = self._kernels(self.kernel_matrix.weight.detach())
        if W.data_ptr() != new.weight.data_ptr() or W.stride() != new.weight.stride():
            with torch.no_grad():
                new.weight.copy_(W)
        new.bias = self.kernel_matrix.bias
        return made

    def empty(self) -> nn.Module:
        """Return a convolution of the original class, whose weight has no values, with the present bias."""
        new: nn.Module = self.origin.__new__(self.origin)
        nn.Module.__init__(new)
        take_over(new, self, leave_out=("origin", "splits", "is_group"))
        layer = self.kernel_matrix
        like = next(chain(layer.parameters(), layer.buffers()))
        W = torch.empty(layer.out_features, layer.in_features, dtype=type_of(layer), device=like.device)
        new.weight = nn.Parameter(self._kernels(W), requires_grad=like.requires_grad)
        new.register_parameter("bias", layer.bias)
        return new

    def extra_repr(self) -> str:
        """Return the settings for `print(model)`, as the replaced convolution does."""
        told: str = self.origin.extra_repr(self)
        return told

    def _kernels(self, W: Tensor) -> Tensor:
        """Return the rows of W (k, n) as kernels (k, C, k1, k2)."""
        return W.reshape(len(W), self.in_channels, *self.kernel_size)

    def _mixed(self, x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the combinations of channels by the rows of W (m, k), for x (B, k, ...)."""
        apply = functional.conv1d if len(self.kernel_size) == 1 else functional.conv2d
        return apply(x, W.reshape(*W.shape, *[1] * len(self.kernel_size)), bias)

    def _convolved(self, x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the convolution by the rows of W (k, n)."""
        origin: Any = self.origin
        output: Tensor = origin._conv_forward(self, x, self._kernels(W), bias)  # noqa: SLF001
        return output

    def _from_patches(self, x: Tensor) -> Tensor:
        """Multiply the patches of x by the matrix, a few positions at a time."""
        dims, places = len(self.kernel_size), self.positions(x)
        single = x.dim() == dims + 1
        x = x[None] if single else x
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        x = functional.pad(x, self._around(), mode=mode)
        x = x[..., None] if dims == 1 else x
        parts = self._split(x, places)
        again = torch.is_grad_enabled() and len(parts) * len(parts[0]) > 1
        compute: Callable[[Tensor], Tensor] = self._on_part_made_again if again else self._on_part
        output = torch.cat([torch.cat([compute(part) for part in rows], 2) for rows in parts])
        output = output.flatten(2).reshape(*output.shape[:2], *places)
        return output[0] if single else output

    def _split(self, x: Tensor, places: tuple[int, ...]) -> list[list[Tensor]]:
        """Split x (B, C, N1, N2), which is padded, into groups of images, and these into rows of positions."""
        if not self.splits or torch.compiler.is_compiling():
            return [[x]]
        rows, columns = (*places, 1)[:2]
        row = columns * self.in_channels * math.prod(self.kernel_size)
        images = max(1, PATCH_NUMBERS // (rows * row))
        lines = rows if rows * row <= PATCH_NUMBERS else max(1, PATCH_NUMBERS // row)
        reach, step = self.dilation[0] * (self.kernel_size[0] - 1) + 1, self.stride[0]
        ends = [(first, min(first + lines, rows) - 1) for first in range(0, rows, lines)]
        return [
            [part[:, :, first * step : last * step + reach] for first, last in ends] for part in torch.split(x, images)
        ]

    def _on_part(self, x: Tensor) -> Tensor:
        """Return the output (b, m, P1, P2) at all positions of x (b, C, N1, N2)."""
        sizes, dilation, stride = ((*each, 1)[:2] for each in (self.kernel_size, self.dilation, self.stride))
        patches = functional.unfold(x, sizes, dilation=dilation, stride=stride).transpose(1, 2)
        lengths = zip(x.shape[2:], dilation, sizes, stride, strict=True)
        rows, columns = ((n - d * (k - 1) - 1) // s + 1 for n, d, k, s in lengths)
        y: Tensor = self.kernel_matrix(patches)
        return y.transpose(1, 2).reshape(len(y), y.shape[2], rows, columns)

    def _on_part_made_again(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self._on_part, x, use_reentrant=False)
        return y


def fault_of(module: nn.Module) -> str | None:
    """Return why a convolution cannot be unfolded; None if it can."""
    own: Any = module
    if type(module) not in (nn.Conv1d, nn.Conv2d) or "forward" in vars(module):
        return f"{type(module).__name__} may compute something else than nn.Conv1d or nn.Conv2d, which are supported"
    if own.groups > 1:
        return "its channels are in groups, each with a matrix of its own"
    if type(module._parameters.get("weight")) is not nn.Parameter:  # noqa: SLF001
        return "its weight is computed from other parameters, or spread over processes"
    return None


def unfold(model: nn.Module, names: Iterable[str]) -> None:
    """Replace the convolutions whose matrices have these names by unfolded ones, in place, in all their places."""
    wanted, made = set(names), dict[int, UnfoldedConvolution]()
    for name, module in model.named_modules():
        if f"{name}.{KERNELS}" in wanted and isinstance(module, (nn.Conv1d, nn.Conv2d)) and fault_of(module) is None:
            made[id(module)] = UnfoldedConvolution(module)
    for parent in list(model.modules()):
        for leaf, module in list(parent._modules.items()):  # noqa: SLF001  named_children leaves out repeated ones
            if id(module) in made:
                setattr(parent, leaf, made[id(module)])


def unfolded(model: nn.Module) -> Iterator[tuple[str, UnfoldedConvolution]]:
    """Yield the name and module of every unfolded convolution that is not one group of another."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, UnfoldedConvolution)]
    return ((name, module) for name, module in found if not module.is_group)
