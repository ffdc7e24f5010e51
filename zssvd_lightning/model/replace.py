"""Replacement of layers, and the parts of layers that are already compressed."""

from collections.abc import Iterator

from torch import nn

from zssvd_lightning.layers.base import CompressedLinear
from zssvd_lightning.layers.registry import Factored


def inside_compressed(model: nn.Module) -> set[int]:
    """Return the ids of all submodules of compressed layers, including adapters."""
    compressed = [module for module in model.modules() if isinstance(module, CompressedLinear)]
    return {id(part) for layer in compressed for part in layer.modules() if part is not layer}


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace every occurrence of `old` in the module tree by `new`, including shared ones."""
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):  # noqa: SLF001  (named_children skips repeated modules)
            if child is old:
                setattr(parent, key, new)


def factored_layers(model: nn.Module) -> Iterator[tuple[str, Factored]]:
    """Yield the name and module of every layer of trainable factors."""
    return ((name, part) for name, part in model.named_modules() if isinstance(part, Factored))
