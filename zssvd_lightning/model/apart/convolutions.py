"""Convolutions of a model that are linear layers over patches during a compression."""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn

from zssvd_lightning.layers.base import CompressedLinear
from zssvd_lightning.layers.convolutions import KERNELS, UnfoldedConvolution, fault_of, unfolded
from zssvd_lightning.model.peft_layers import wraps_by_peft

logger = logging.getLogger(__name__)

Replace = Callable[[nn.Module, nn.Module, nn.Module], None]

CONVOLUTION = nn.modules.conv._ConvNd  # noqa: SLF001  the base class of all
"""Class of all convolutions of torch."""

SHOWN = 3
"""Number of names that a log line has."""


def convolutions(model: nn.Module) -> dict[str, nn.Module]:
    """Return the convolutions of a model that are not unfolded, by qualified name in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CONVOLUTION)}


def matrices_of_convolutions(model: nn.Module) -> dict[str, nn.Module]:
    """Return each convolution, by the name that its matrix has as a linear layer."""
    return {f"{name}.{KERNELS}": module for name, module in convolutions(model).items()}


def why_whole(model: nn.Module) -> dict[str, str]:
    """Return the convolutions that cannot be unfolded, by name, each with the reason."""
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    wrapped = [f"{name}." for name, module in model.named_modules() if name and wraps_by_peft(module)]
    found = {}
    for name, module in convolutions(model).items():
        reason = fault_of(module)
        if name.startswith(tuple(wrapped)):
            reason = "PEFT adapts it; merge the adapter first"
        weight: Any = module._parameters.get("weight")  # noqa: SLF001
        if reason is None and owners[id(weight)] > 1:
            reason = "its weight is tied to that of another module"
        if reason is None and (not weight.is_floating_point() or weight.dtype.itemsize < 2):
            reason = f"its weight is {weight.dtype}, which holds quantized codes"
        if reason is not None:
            found[name] = reason
    return found


class UnfoldedConvolutions:
    """Unfolded convolutions that replace those of a model, with the same memory, until they are put back.

    Args:
        model: any module.
        selected: function that returns whether the matrix of this name is to be compressed.
        replace: function that replaces a module, `replace(model, old, new)`.

    Attributes:
        modules: the convolutions to compress, by qualified name.
        left: name -> reason, for those that cannot be unfolded. They stay as they are.
    """

    def __init__(self, model: nn.Module, selected: Callable[[str], bool], replace: Replace) -> None:
        self._model, self._replace = model, replace
        self._unfolded: dict[str, UnfoldedConvolution] = {}
        reasons = why_whole(model)
        chosen = {name: module for name, module in convolutions(model).items() if selected(f"{name}.{KERNELS}")}
        self.modules: dict[str, Any] = {name: module for name, module in chosen.items() if name not in reasons}
        self.left = {name: reasons[name] for name in chosen if name in reasons}

    def put_in(self) -> None:
        """Replace the convolutions by unfolded ones, and log which stay as they are and why."""
        total = sum(p.numel() for p in self._model.parameters())
        for reason in dict.fromkeys(self.left.values()):
            names = [name for name in self.left if self.left[name] == reason]
            theirs = sum(p.numel() for name in names for p in self._model.get_submodule(name).parameters())
            logger.warning(
                "convolutions are not compressed (%s; %.1f%% of the model's parameters): %s",
                ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} others" if len(names) > SHOWN else ""),
                100 * theirs / max(1, total),
                reason,
            )
        for name, old in self.modules.items():
            self._unfolded[name] = UnfoldedConvolution(old)
            self._replace(self._model, old, self._unfolded[name])

    def put_back(self, leave: Collection[str] = ()) -> None:
        """Put the convolutions back, with the present weights, where the matrix is not compressed.

        Args:
            leave: names of layers that will be compressed later, whose convolutions stay unfolded.
        """
        present = {id(module) for module in self._model.modules()} if self._unfolded else set()
        for name, new in self._unfolded.items():
            later = f"{name}.{KERNELS}" in leave or isinstance(new.kernel_matrix, CompressedLinear)
            if id(new) in present and not later:
                old = new.folded(self.modules[name])
                old.train(new.training)
                self._replace(self._model, new, old)

    def write_folded(self, weights: dict[str, Any]) -> None:
        """In a state dict of the model, replace the entries of unfolded convolutions by those of the original ones."""
        names = {id(new): name for name, new in self._unfolded.items()}
        for place, module in self._model.named_modules(remove_duplicate=False):
            if id(module) in names and isinstance(module, UnfoldedConvolution):
                for key in module.state_dict():
                    weights.pop(f"{place}.{key}", None)
                old = module.folded(self.modules[names[id(module)]])
                weights.update({f"{place}.{key}": value for key, value in old.state_dict().items()})


def match_convolutions(model: nn.Module, weights: Mapping[str, Any], replace: Replace) -> Callable[[], None]:
    """Unfold convolutions or fold them, as the names of saved weights are, and return a function that undoes it.

    Convolutions that are folded for this get no values.

    Args:
        model: the module that will load the weights.
        weights: the state dict to load.
        replace: function that replaces a module, `replace(model, old, new)`.
    """
    done: list[tuple[nn.Module, nn.Module]] = []
    known = {key.rpartition(f".{KERNELS}.")[0] for key in weights if f".{KERNELS}." in key}
    for name, module in convolutions(model).items():
        if name in known and fault_of(module) is None and isinstance(module, (nn.Conv1d, nn.Conv2d)):
            done.append((module, UnfoldedConvolution(module)))
    for name, new in unfolded(model):
        if f"{name}.weight" in weights:
            done.append((new, new.empty()))
    for old, new_one in done:
        replace(model, old, new_one)

    def undo() -> None:
        for old, new_one in done:
            replace(model, new_one, old)

    return undo
