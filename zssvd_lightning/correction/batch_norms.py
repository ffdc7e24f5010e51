"""Running statistics of batch norms, estimated again behind layers that changed.

Shapes: a batch norm of C channels reads x (B, C, ...), which has N = B * ... values in each channel.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn

from zssvd_lightning._numerics import accumulated

Measured = TypeVar("Measured")

NORM = nn.modules.batchnorm._BatchNorm  # noqa: SLF001  the base class of all
"""Class of batch norms of any number of dimensions."""


class Sums(NamedTuple):
    """Sums over the inputs of a batch norm."""

    number: int
    """N, the number of values in each channel."""
    mean: Tensor
    """Mean of the values (C,), on the CPU."""
    squares: Tensor
    """Sum of the squares of their distances from the mean (C,), on the CPU."""

    @property
    def variance(self) -> Tensor:
        """Unbiased variance (C,), as running statistics hold it."""
        return self.squares / (self.number - 1)


class SumsBehind:
    """Sums over the inputs of the batch norms that run after one of `layers` in a forward pass.

    These batch norms normalize by the statistics of the batch meanwhile, as in training, so that those after them get
    the inputs that they will have. It is a context; on exit the hooks are gone, and running statistics as before.

    Args:
        model: any module, in evaluation mode when it runs.
        layers: layers that changed.

    Attributes:
        sums: sums by the name of the batch norm.
    """

    def __init__(self, model: nn.Module, layers: Collection[nn.Module]) -> None:
        self._model, self._layers, self._behind = model, layers, False
        self.sums: dict[str, Sums] = {}
        self._hooks = ExitStack()

    def __enter__(self) -> Self:
        for layer in self._layers:
            self._hooks.callback(layer.register_forward_hook(self._pass).remove)
        for name, module in self._model.named_modules():
            if isinstance(module, NORM) and module.running_mean is not None and module.running_var is not None:
                for buffer in (module.running_mean, module.running_var):
                    self._hooks.callback(buffer.copy_, buffer.clone())
                self._hooks.callback(module.register_forward_pre_hook(self._watch(name)).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def in_each(self, measure: Callable[[Any], Measured]) -> Callable[[Any], Measured]:
        """Return `measure`, which runs the model on a batch, with the beginning of a forward pass before each call."""

        def begin(batch: Any) -> Measured:
            self._behind = False
            return measure(batch)

        return begin

    def _pass(self, *_: object) -> None:
        self._behind = True

    def _watch(self, name: str) -> Callable[..., None]:
        @torch.no_grad()
        def watch(module: Any, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach()
            number = x.numel() // max(1, module.num_features)
            if not self._behind or number < 2:
                return
            variance, mean = torch.var_mean(x.to(accumulated(x.dtype)), [0, *range(2, x.dim())], correction=0)
            module.running_mean.copy_(mean)
            module.running_var.copy_(variance)
            found = Sums(number, mean.cpu().double(), number * variance.cpu().double())
            self.sums[name] = total([found, *([self.sums[name]] if name in self.sums else [])])

        return watch


def total(parts: Iterable[Sums]) -> Sums:
    """Return the sums over several sets of inputs of one batch norm."""
    every = list(parts)
    number = sum(part.number for part in every)
    mean = torch.stack([part.number / number * part.mean for part in every]).sum(0)
    apart = [part.squares + part.number * (part.mean - mean).square() for part in every]
    return Sums(number, mean, torch.stack(apart).sum(0))


@torch.no_grad()
def set_statistics(model: nn.Module, sums: Mapping[str, Sums]) -> Callable[[], None]:
    """Set the running statistics of batch norms to those of sums, by name, and return a function that undoes it."""
    before: list[tuple[Tensor, Tensor]] = []
    for name, found in sums.items():
        module: Any = model.get_submodule(name)
        for buffer, value in ((module.running_mean, found.mean), (module.running_var, found.variance)):
            before.append((buffer, buffer.clone()))
            buffer.copy_(value)

    def undo() -> None:
        for buffer, value in before:
            buffer.copy_(value)

    return undo
