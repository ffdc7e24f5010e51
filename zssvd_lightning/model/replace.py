"""Put one layer in the place of another, and tell what lies inside a layer that is compressed already."""

from torch import nn

from zssvd_lightning.layers.base import CompressedLinear


def inside_compressed(model: nn.Module) -> set[int]:
    """Ids of the parts of compressed layers, adapters on them included."""
    compressed = [module for module in model.modules() if isinstance(module, CompressedLinear)]
    return {id(part) for layer in compressed for part in layer.modules() if part is not layer}


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts `new` wherever `old` stands in the tree, shared places included."""
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):  # noqa: SLF001  (named_children skips a second place)
            if child is old:
                setattr(parent, key, new)
