"""Temporary changes of a model while its batches are read: which parameters get gradients."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zssvd_lightning.model.targets import Target


@contextmanager
def gradients_only_at(model: nn.Module, targets: Mapping[str, Target]) -> Iterator[None]:
    """Has gradients flow to the targets alone and, on any exit, to where they did before."""
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
    """Has embeddings give outputs that require gradients, without which reentrant checkpointing would pass none on."""

    def require(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if output.requires_grad or not torch.is_grad_enabled():
            return None
        return output.detach().requires_grad_().clone()  # no leaf, so that models may go on in place

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                hooks.callback(module.register_forward_hook(require).remove)
        yield
