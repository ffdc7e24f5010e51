"""Attentions of torch that have linear layers during a compression. The replacement is proved on random inputs."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zssvd_lightning.layers.apart.attention import (
    BIASES,
    PACKED,
    READING,
    WRITING,
    ProjectedAttention,
    fault_of,
    settle_encoders,
)
from zssvd_lightning.model.apart.kind import Kind, difference_in

SEED = 0


class Attentions(Kind):
    """Modules of class `nn.MultiheadAttention`."""

    what: ClassVar[str] = "attentions of torch"
    told: ClassVar[str] = "reads its projections itself, so that they are compressed as separate layers"
    form: ClassVar[type[nn.Module]] = ProjectedAttention

    def find(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the attentions that are whole."""
        return {name: module for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}

    def parts(self, module: nn.Module) -> list[str]:
        """Return the names of the four linear layers."""
        return [*READING, WRITING]

    def fault(self, module: nn.Module) -> str | None:
        """Return why the class or the settings do not fit."""
        return fault_of(module)

    def weights(self, module: nn.Module) -> list[Tensor | None]:
        """Return the matrices and biases."""
        own: Any = module
        names = [PACKED] if own.in_proj_weight is not None else [f"{name}_weight" for name in READING]
        names += [BIASES] if own.in_proj_bias is not None else []
        weights = [own._parameters.get(name) for name in names]  # noqa: SLF001
        last = own.out_proj._parameters  # noqa: SLF001
        return [*weights, last.get("weight"), *([] if own.out_proj.bias is None else [last.get("bias")])]

    def whole(self, new: ProjectedAttention, old: nn.Module | None) -> nn.Module:
        """Return the attention of torch."""
        return new.packed(old)

    def only_whole(self, new: ProjectedAttention) -> str:
        """Return the name of the parameter with the matrix of the queries."""
        return PACKED if new.is_packed else "q_proj_weight"

    def settle(self, model: nn.Module) -> None:
        """Keep encoders from making nested tensors; see `settle_encoders`."""
        settle_encoders(model)

    def difference(self, old: nn.Module, new: ProjectedAttention) -> str | None:
        """Compare the outputs for three queries and five keys, with masks and weights of the attention and without."""
        weight = next(new.parameters())
        generator = torch.Generator().manual_seed(SEED)
        sizes = [(2, 3, new.embed_dim), (2, 5, new.kdim), (2, 5, new.vdim)]
        inputs = [torch.randn(size, generator=generator).to(weight) for size in sizes]
        inputs = inputs if new.batch_first else [x.transpose(0, 1) for x in inputs]
        padding = torch.tensor([[False] * 5, [False] * 4 + [True]], device=weight.device)
        ahead = torch.ones(3, 5, dtype=torch.bool, device=weight.device).triu(1)
        calls = [(*inputs, None, False), (*inputs, padding, True, ahead)]
        return difference_in(old, new, calls, "random queries, keys and values")


ATTENTION = Attentions()
