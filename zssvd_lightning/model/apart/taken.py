"""Modules of a model that are in parts during a compression, and loading of weights of either form."""

import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn

from zssvd_lightning.layers.base import CompressedLinear, own_memory
from zssvd_lightning.model.apart.kind import Kind, why_whole

logger = logging.getLogger(__name__)

Replace = Callable[[nn.Module, nn.Module, nn.Module], None]

SHOWN = 3
"""Number of names that a log line has."""


class TakenApart:
    """Modules of linear layers that replace those of one kind, with the same memory, until they are put back.

    Args:
        kind: the kind of the modules.
        model: any module.
        selected: function that returns whether a layer of this name is to be compressed. Modules without such a layer
            are left alone.
        replace: function that replaces a module, `replace(model, old, new)`.

    Attributes:
        modules: the modules with layers to compress, by qualified name.
        left: name -> reason, for those that cannot be taken apart. They stay as they are.
    """

    def __init__(self, kind: Kind, model: nn.Module, selected: Callable[[str], bool], replace: Replace) -> None:
        self._model, self._replace, self.kind = model, replace, kind
        self._new: dict[str, nn.Module] = {}
        chosen = {
            name: module
            for name, module in kind.find(model).items()
            if any(selected(part) for part in names_of_parts(kind, name, module))
        }
        reasons = why_whole(kind, model) if chosen else {}
        self.modules = {name: module for name, module in chosen.items() if name not in reasons}
        self.left = {name: reasons[name] for name in chosen if name in reasons}

    def put_in(self, *, proves: bool = True) -> None:
        """Replace the modules, and log which stay as they are and why.

        Args:
            proves: False for a model without values, where the outputs of both cannot be compared.
        """
        for name, old in self.modules.items():
            new = self.kind.form(old)
            if proves and (reason := self.kind.difference(old, new)) is not None:
                self.left[name] = reason
                continue
            self._new[name] = new
            self._replace(self._model, old, new)
        self.kind.settle(self._model)
        total = sum(p.numel() for p in self._model.parameters())
        for reason in dict.fromkeys(self.left.values()):
            names = [name for name in self.left if self.left[name] == reason]
            theirs = sum(p.numel() for name in names for p in self._model.get_submodule(name).parameters())
            logger.warning(
                "%s are not compressed (%s; %.1f%% of the model's parameters): %s",
                self.kind.what,
                ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} others" if len(names) > SHOWN else ""),
                100 * theirs / max(1, total),
                reason,
            )

    def put_back(self, leave: Collection[str] = ()) -> None:
        """Put the modules back, with the present weights, where no layer of theirs is compressed.

        Args:
            leave: names of layers that will be compressed later, whose modules stay in parts.
        """
        present = {id(module) for module in self._model.modules()} if self._new else set()
        for name, new in self._new.items():
            if id(new) not in present:
                continue
            later = any(part in leave for part in names_of_parts(self.kind, name, self.modules[name]))
            if not later and not any(isinstance(part, CompressedLinear) for part in new.modules()):
                old = self.kind.whole(new, self.modules[name])
                old.train(new.training)
                self._replace(self._model, new, old)
            elif self.kind.separates:
                own_memory(new)
        if self._new:
            self.kind.settle(self._model)

    def write_whole(self, weights: dict[str, Any]) -> None:
        """In a state dict of the model, replace the entries of modules in parts by those of the original ones."""
        names = {id(new): name for name, new in self._new.items()}
        for place, module in self._model.named_modules(remove_duplicate=False):
            if id(module) in names:
                for key in module.state_dict():
                    weights.pop(f"{place}.{key}", None)
                old = self.kind.whole(module, self.modules[names[id(module)]])
                weights.update({f"{place}.{key}": value for key, value in old.state_dict().items()})


def names_of_parts(kind: Kind, name: str, module: nn.Module) -> list[str]:
    """Return the qualified names of the linear layers of a whole module."""
    return [f"{name}.{part}" if name else part for part in kind.parts(module)]


def match_parts(kind: Kind, model: nn.Module, weights: Mapping[str, Any], replace: Replace) -> Callable[[], None]:
    """Take modules apart or put them together, as the names of saved weights are, and return a function that undoes it.

    Modules that are put together for this get no values.

    Args:
        kind: the kind of the modules.
        model: the module that will load the weights.
        weights: the state dict to load.
        replace: function that replaces a module, `replace(model, old, new)`.
    """
    done: list[tuple[nn.Module, nn.Module]] = []
    layers = {".".join(key.split(".")[:depth]) for key in weights for depth in range(key.count(".") + 1)}
    for name, module in kind.find(model).items():
        parts = names_of_parts(kind, name, module)
        if kind.fault(module) is None and any(part in layers for part in parts[:2]):
            done.append((module, kind.form(module)))
    for name, new in model.named_modules():
        if isinstance(new, kind.form) and f"{name}.{kind.only_whole(new)}" in weights:
            done.append((new, kind.empty(new)))
    for old, new in done:
        replace(model, old, new)
    kind.settle(model)

    def undo() -> None:
        for old, new in done:
            replace(model, new, old)
        kind.settle(model)

    return undo
