"""Convolutions with groups of channels, each of which is a linear layer over patches during a compression."""

from typing import ClassVar

from torch import nn

from zssvd_lightning.layers.apart.grouped import GroupedConvolution, grouped_fault_of, is_grouped, parts_of
from zssvd_lightning.model.apart.kind import Kind


class GroupedConvolutions(Kind):
    """Convolutions with groups, of which those whose matrices low rank can make smaller are taken apart."""

    what: ClassVar[str] = "convolutions"
    told: ClassVar[str] = "has a matrix for each group, which is compressed as a linear layer over patches"
    instead: ClassVar[str] = "set convolutions to False"
    opt_in: ClassVar[str | None] = "convolutions"
    form: ClassVar[type[nn.Module]] = GroupedConvolution

    def find(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the convolutions with groups that are whole."""
        return {name: module for name, module in model.named_modules() if is_grouped(module)}

    def parts(self, module: nn.Module) -> list[str]:
        """Return the names of the layers of all groups."""
        return parts_of(module)

    def fault(self, module: nn.Module) -> str | None:
        """Return why the groups cannot be layers, or why low rank cannot make them smaller."""
        return grouped_fault_of(module)

    def whole(self, new: GroupedConvolution, old: nn.Module | None) -> nn.Module:
        """Return the convolution with groups."""
        return new.folded(old)

    def only_whole(self, new: GroupedConvolution) -> str:
        """Return the name of the weight."""
        return "weight"


GROUPED_CONVOLUTIONS = GroupedConvolutions()
