"""Temporary changes to a model during calibration batches."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction
from torchmetrics import Metric

from zssvd_lightning._contexts import evaluation_mode, no_cache, same_random_numbers, uncompiled
from zssvd_lightning.errors import CalibrationError
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


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Evaluate a model without gradients and with the same random numbers each time, and leave no traces.

    Buffers, metrics, plain Python attributes of modules and random number generators are restored on any exit.

    Raises:
        CalibrationError: on exit, if a parameter was changed.
    """
    versions = [(name, parameter, parameter._version) for name, parameter in model.named_parameters()]  # noqa: SLF001
    with ExitStack() as stack:
        stack.enter_context(same_random_numbers())
        for module in model.modules():
            stack.callback(_attributes_of(module))
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(no_cache(model))
        stack.enter_context(uncompiled())
        stack.enter_context(torch.no_grad())
        yield
    for name, parameter, version in versions:
        if parameter._version != version:  # noqa: SLF001
            raise CalibrationError(f"computing the loss of a batch changed the parameter {name}")


PLAIN = (bool, int, float, str, type(None))
"""Types of attributes that are restored by assignment."""


def _attributes_of(module: nn.Module) -> Callable[[], None]:
    """Return a function that restores the buffers, metric states and plain attributes of a module."""
    buffers = {name: (b, None if b is None else b.clone()) for name, b in module._buffers.items()}  # noqa: SLF001
    public = {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "training"}
    plain = {name: value for name, value in public.items() if type(value) in PLAIN}
    containers = [(value, value.copy()) for value in public.values() if type(value) in {list, dict, set}]
    states = {}
    if isinstance(module, Metric):
        names = [*module._defaults, "_computed", "_update_count"]  # noqa: SLF001
        states = {name: deepcopy(vars(module)[name]) for name in names if name in vars(module)}

    def restore() -> None:
        for name, (buffer, value) in buffers.items():
            if buffer is not None and value is not None:
                buffer.copy_(value)
            module._buffers[name] = buffer  # noqa: SLF001
        vars(module).update(plain | states)
        for container, before in containers:
            container.clear()
            container.extend(before) if isinstance(container, list) else container.update(before)

    return torch.no_grad()(restore)


@contextmanager
def unchanged_sampler(loader: Any) -> Iterator[None]:
    """Restore the epoch and the generators of a DataLoader and its sampler, which a pass changes, on any exit."""
    drawn: Any = getattr(loader, "batch_sampler", None)
    while hasattr(drawn, "batch_sampler"):  # accelerate wraps one that gives each process its share
        drawn = drawn.batch_sampler
    sampler = getattr(drawn, "sampler", getattr(loader, "sampler", None))
    epoch = getattr(sampler, "epoch", None)
    generators = [getattr(each, "generator", None) for each in (loader, sampler)]
    states = [(each, each.get_state()) for each in generators if isinstance(each, torch.Generator)]
    try:
        yield
    finally:
        if epoch is not None:
            sampler.epoch = epoch  # type: ignore[union-attr]
        for generator, state in states:
            generator.set_state(state)


def in_reentrant_checkpoint() -> bool:
    """Return whether the caller runs in the forward pass of `torch.utils.checkpoint` with `use_reentrant=True`."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is CheckpointFunction.forward.__code__:
            return True
        frame = frame.f_back
    return False
