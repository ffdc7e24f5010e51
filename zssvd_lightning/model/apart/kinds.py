"""The kinds of modules that are taken apart for a compression."""

from collections.abc import Collection

from torch import nn

from zssvd_lightning.model.apart.attention import ATTENTION
from zssvd_lightning.model.apart.convolutions import CONVOLUTIONS
from zssvd_lightning.model.apart.experts import EXPERTS
from zssvd_lightning.model.apart.grouped import GROUPED_CONVOLUTIONS
from zssvd_lightning.model.apart.kind import Kind, why_whole
from zssvd_lightning.model.apart.recurrent import RECURRENCES
from zssvd_lightning.model.apart.taken import names_of_parts

KINDS: tuple[Kind, ...] = (EXPERTS, CONVOLUTIONS, GROUPED_CONVOLUTIONS, ATTENTION, RECURRENCES)
"""All kinds, in the order in which their modules are taken apart."""


def matrices_of(kind: Kind, model: nn.Module) -> dict[str, nn.Module]:
    """Return the whole module of each matrix of a kind, by the name that the matrix has as a linear layer."""
    found = kind.find(model).items()
    return {part: module for name, module in found for part in names_of_parts(kind, name, module)}


def convolutions_whole(model: nn.Module) -> dict[str, str]:
    """Return the convolutions that cannot be targets, by name, each with the reason."""
    return why_whole(CONVOLUTIONS, model) | why_whole(GROUPED_CONVOLUTIONS, model)


def not_asked(model: nn.Module, opted: Collection[str]) -> dict[int, str]:
    """Return the layers in parts of kinds that are only taken apart on request, by id, with the missing setting.

    Args:
        model: any module.
        opted: settings that are on.
    """
    found = {}
    for kind in KINDS:
        if kind.opt_in is not None and kind.opt_in not in opted:
            modules = [module for module in model.modules() if isinstance(module, kind.form)]
            found.update({id(layer): kind.opt_in for module in modules for layer in module.modules()})
    return found


def all_matrices(model: nn.Module) -> dict[str, nn.Module]:
    """Return the whole module of each matrix of any kind; see `matrices_of`."""
    return {name: module for kind in KINDS for name, module in matrices_of(kind, model).items()}
