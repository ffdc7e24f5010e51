"""Replacement of layers, and the parts of layers that are already compressed."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import nn

from zssvd_lightning.layers.base import CompressedLinear
from zssvd_lightning.layers.registry import Factored


def inside_compressed(model: nn.Module) -> set[int]:
    """Return the ids of all submodules of compressed layers, including adapters."""
    compressed = [module for module in model.modules() if isinstance(module, CompressedLinear)]
    return {id(part) for layer in compressed for part in layer.modules() if part is not layer}


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace every occurrence of `old` in the module tree by `new`, including shared ones."""
    known = _KNOWN.get()
    if known is not None and known.model is model:
        known.replace(old, new)
        return
    for parent in list(model.modules()):
        for key, child in list(_children(parent)):
            if child is old:
                setattr(parent, key, new)


@contextmanager
def places_known(model: nn.Module) -> Iterator[None]:
    """Let `replace_module` look up the places of modules within the context, instead of searching the whole model.

    Within the context, the module tree must change by `replace_module` alone.
    """
    before = _KNOWN.set(_Places(model))
    try:
        yield
    finally:
        _KNOWN.reset(before)


class _Places:
    """Places of all modules of a model, which change with them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._of: dict[nn.Module, list[tuple[nn.Module, str]]] = {model: []}
        self._add_children(model)

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        """Replace a module at all its places; see `replace_module`."""
        if old is new or not (places := self._of.get(old)):
            return
        self._of[old] = []
        for parent, key in places:
            setattr(parent, key, new)
        known = new in self._of
        self._of.setdefault(new, []).extend(places)
        if not known:
            self._add_children(new)
        if not self._of[old]:  # `new` may hold it
            self._drop(old)

    def _add_children(self, parent: nn.Module) -> None:
        """Add the places of what a module holds, and of what these hold."""
        left = [parent]
        while left:
            holder = left.pop()
            for key, child in _children(holder):
                if child not in self._of:
                    self._of[child] = []
                    left.append(child)
                self._of[child].append((holder, key))

    def _drop(self, module: nn.Module) -> None:
        """Forget a module that has no place in the model any more, and the places in it."""
        del self._of[module]
        for key, child in _children(module):
            places = self._of[child]
            places.remove((module, key))
            if not places and child is not self.model:
                self._drop(child)


def _children(parent: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of each child, also of repeated ones, which `named_children` skips."""
    return ((key, child) for key, child in parent._modules.items() if child is not None)  # noqa: SLF001


_KNOWN: ContextVar[_Places | None] = ContextVar("zssvd_places", default=None)


def factored_layers(model: nn.Module) -> Iterator[tuple[str, Factored]]:
    """Yield the name and module of every layer of trainable factors."""
    return ((name, part) for name, part in model.named_modules() if isinstance(part, Factored))
