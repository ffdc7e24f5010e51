"""The kinds of modules that are taken apart for a compression."""

from torch import nn

from zssvd_lightning.model.apart.attention import ATTENTION
from zssvd_lightning.model.apart.convolutions import CONVOLUTIONS
from zssvd_lightning.model.apart.experts import EXPERTS
from zssvd_lightning.model.apart.kind import Kind
from zssvd_lightning.model.apart.taken import names_of_parts

KINDS: tuple[Kind, ...] = (EXPERTS, CONVOLUTIONS, ATTENTION)
"""All kinds, in the order in which their modules are taken apart."""


def matrices_of(kind: Kind, model: nn.Module) -> dict[str, nn.Module]:
    """Return the whole module of each matrix of a kind, by the name that the matrix has as a linear layer."""
    found = kind.find(model).items()
    return {part: module for name, module in found for part in names_of_parts(kind, name, module)}


def all_matrices(model: nn.Module) -> dict[str, nn.Module]:
    """Return the whole module of each matrix of any kind; see `matrices_of`."""
    return {name: module for kind in KINDS for name, module in matrices_of(kind, model).items()}
