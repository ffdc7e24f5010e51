"""Temporary changes to a model during calibration batches: which tensors require gradients."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zssvd_lightning.model.targets import Target


@contextmanager
def gradients_only_at(model: nn.Module, targets: Mapping[str, Target]) -> Iterator[None]:
    """Let only the weights of the targets require gradients; restore all flags on any exit."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        for target in targets.values():
            target.module.weight.requires_grad_(True)
        yield
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)


@contextmanager
def gradients_from_embeddings_on(model: nn.Module) -> Iterator[None]:
    """Make outputs of embeddings require gradients, without which reentrant checkpointing returns no gradients."""

    def require(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if output.requires_grad or not torch.is_grad_enabled():
            return None
        return output.detach().requires_grad_().clone()  # not a leaf, so that models may change it in place

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                hooks.callback(module.register_forward_hook(require).remove)
        yield
