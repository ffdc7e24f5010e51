"""Stacked experts of a model that are separate linear layers during a compression.

The modules are recognized by their structure, and the replacement is proved: both must give the same outputs.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from zssvd_lightning.layers.apart.experts import DOWN, ExpertList, is_stacked, matrices_of
from zssvd_lightning.model.apart.kind import Kind, difference_in

SEED = 0


class Experts(Kind):
    """Modules that stack the matrices of experts."""

    what: ClassVar[str] = "stacked experts"
    told: ClassVar[str] = "stacks experts, which are compressed as separate layers"
    form: ClassVar[type[nn.Module]] = ExpertList

    def find(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the modules that stack experts."""
        return {name: module for name, module in model.named_modules() if is_stacked(module)}

    def parts(self, module: nn.Module) -> list[str]:
        """Return the names of the layers of all experts."""
        return matrices_of(module)

    def whole(self, new: ExpertList, old: nn.Module | None) -> nn.Module:
        """Return the module that stacks the experts."""
        return new.stacked(old)

    def only_whole(self, new: ExpertList) -> str:
        """Return the name of the first stack."""
        return new.stacks[0]

    def difference(self, old: nn.Module, new: ExpertList) -> str | None:
        """Compare the outputs for random tokens, of which each expert gets two."""
        weight: Tensor = getattr(new.experts[0], DOWN).weight
        count, n = len(new.experts), len(weight)
        generator = torch.Generator().manual_seed(SEED)
        tokens = torch.randn(count, n, generator=generator).to(weight)
        experts = torch.stack([torch.arange(count), torch.arange(1, count + 1) % count], 1)[:, : min(2, count)]
        what = f"tokens ({count}, {n}) with the experts and weights of each"
        if new.repeats:
            repeated = tokens.repeat(count, 1) * (torch.arange(count * count) % 3 > 0)[:, None].to(weight)
            return difference_in(old, new, [(repeated,)], what)
        shares = torch.rand(experts.shape, generator=generator).add_(0.5).to(weight)
        return difference_in(old, new, [(tokens, experts.to(weight.device), shares)], what)


EXPERTS = Experts()
