"""Convolutions of a model that are linear layers over patches during a compression."""

from typing import ClassVar

from torch import Tensor, nn

from zssvd_lightning.layers.apart.convolutions import KERNELS, UnfoldedConvolution, fault_of
from zssvd_lightning.layers.apart.grouped import is_grouped
from zssvd_lightning.model.apart.kind import Kind

CONVOLUTION = nn.modules.conv._ConvNd  # noqa: SLF001  the base class of all
"""Class of all convolutions of torch."""


class Convolutions(Kind):
    """Convolutions of any class, of which some can be unfolded, but for those of `GroupedConvolutions`."""

    what: ClassVar[str] = "convolutions"
    told: ClassVar[str] = "is compressed as a linear layer over patches"
    instead: ClassVar[str] = "set convolutions to False"
    opt_in: ClassVar[str | None] = "convolutions"
    form: ClassVar[type[nn.Module]] = UnfoldedConvolution
    separates: ClassVar[bool] = False

    def find(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the convolutions that are not unfolded."""
        found = {name: module for name, module in model.named_modules() if isinstance(module, CONVOLUTION)}
        return {name: module for name, module in found.items() if not is_grouped(module)}

    def parts(self, module: nn.Module) -> list[str]:
        """Return the name of the one matrix."""
        return [KERNELS]

    def fault(self, module: nn.Module) -> str | None:
        """Return why the convolution is no single matrix."""
        return fault_of(module)

    def weights(self, module: nn.Module) -> list[Tensor | None]:
        """Return the weight. The bias stays the same parameter."""
        return [module._parameters.get("weight")]  # noqa: SLF001

    def whole(self, new: UnfoldedConvolution, old: nn.Module | None) -> nn.Module:
        """Return the folded convolution."""
        return new.folded(old)

    def only_whole(self, new: UnfoldedConvolution) -> str:
        """Return the name of the weight."""
        return "weight"


CONVOLUTIONS = Convolutions()
