"""A calibration batch: what counts in it, what state the model is in for it, and what it leaves behind.

What is changed for a batch is put back on any exit.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from zssvd_lightning.errors import CalibrationError, NonFiniteError, ZeroGradientError
from zssvd_lightning.statistics import Moments
from zssvd_lightning.targets import Target

IGNORED_LABEL = -100


def token_mask(batch: Any) -> Tensor | None:
    """Which positions (B, T) of a batch are tokens and not padding: its `attention_mask`, or None for all of them."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    return mask.bool()


def loss_terms(batch: Any) -> int:
    """How many terms the mean loss of a batch runs over, which is the weight of its gradient.

    Labels count where they are not -100. Of labels as long as their inputs (B, T) the first column does not count,
    since causal models never predict it and masked ones have a special token there. Without labels it is the number
    of rows of the first tensor.

    Raises:
        CalibrationError: no label counts, or there is no tensor in the batch.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if isinstance(labels, Tensor):
        inputs = batch.get("input_ids")
        shifted = isinstance(inputs, Tensor) and labels.dim() == 2 and labels.shape == inputs.shape
        counted = labels[:, 1:] if shifted else labels
        terms = int((counted != IGNORED_LABEL).sum())
        if terms == 0:
            raise CalibrationError("a calibration batch has no label to predict: all are -100; drop such batches")
        return terms
    tensors = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, Sequence) else [batch]
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.dim() > 0:
            return len(tensor)
    raise CalibrationError(f"cannot tell the size of a calibration batch of type {type(batch).__name__}")


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What a layer was called with, as its hooks are told."""
    X: Tensor = args[0] if args else next(iter(kwargs.values()))
    return X


def rows_that_count(X: Tensor, mask: Tensor | None) -> Tensor:
    """Rows (N, n) of X at positions in `mask` (B, T), where X is (B, T, n) or (B T, n); all rows of other shapes."""
    if mask is not None and X.shape[:-1] in (mask.shape, (mask.numel(),)):
        return X[mask.reshape(X.shape[:-1])]
    return X.reshape(-1, X.shape[-1])


def uncompiled() -> AbstractContextManager[None]:
    """Within the context compiled modules run as they are written, and with their hooks."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def checked_loss(loss: Any) -> Tensor:
    """The loss, when it is one: a finite scalar with a graph behind it.

    Raises:
        CalibrationError: it is not a scalar tensor that gradients flow from.
        NonFiniteError: it is NaN or infinite.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise CalibrationError(
            f"calibration needs a scalar loss that depends on the target layers, got {found}; return the mean loss"
        )
    if not torch.isfinite(loss):
        raise NonFiniteError(
            f"the loss of a calibration batch is {loss.item()}; check the batch, or calibrate in float32 or bfloat16"
        )
    return loss


def collect_gradients(targets: Mapping[str, Target], moments: Moments, weight: float) -> None:
    """Adds `weight` times the gradients autograd left on the targets, and clears them.

    Raises:
        ZeroGradientError: a layer has run, but no gradient has come to it.
    """
    for name, target in targets.items():
        if (gradient := target.gradient) is not None:
            moments.add_gradient(name, gradient, weight)
        target.module.weight.grad = None
    known = {*moments.gradient_sums, *moments.with_gradient}
    if without := [name for name in moments.leaders if name not in known]:
        raise ZeroGradientError(
            f"the loss has no gradient at {', '.join(without[:3])} ({len(without)} layers), though they run in the "
            "forward pass: it is under torch.no_grad or its output is detached, as a teacher's; or activations are "
            "checkpointed with use_reentrant=True. Add them to ignore, or set use_reentrant=False"
        )


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Puts the model into evaluation mode and, on any exit, each module back into its own."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in was_training:
            module.training = True


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


@contextmanager
def no_cache(model: nn.Module) -> Iterator[None]:
    """Has models of transformers keep no keys and values and, on any exit, each do as it did."""
    configs = [m.config for m in model.modules() if isinstance(m, PreTrainedModel)]
    cached = [config for config in {id(c): c for c in configs}.values() if "use_cache" in config.to_dict()]
    before = [config.use_cache for config in cached]
    try:
        for config in cached:
            config.use_cache = False
        yield
    finally:
        for config, use_cache in zip(cached, before, strict=True):
            config.use_cache = use_cache
