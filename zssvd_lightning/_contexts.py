"""Context managers that change the state of an object and restore it on exit."""

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import nn
from transformers import PreTrainedModel


@contextmanager
def overridden(owner: Any, **attributes: Any) -> Iterator[None]:
    """Set instance attributes of `owner`, shadowing those of its class. Restore the previous state on any exit."""
    own: dict[str, Any] = owner.__dict__
    before = {name: own[name] for name in attributes if name in own}
    own.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            own.pop(name, None)
        own.update(before)


@contextmanager
def method_replaced(owner: type, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Replace a method of a class, inherited or its own. Restore it on any exit."""
    own = owner.__dict__.get(name)
    setattr(owner, name, method)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def uncompiled() -> AbstractContextManager[None]:
    """Return a context in which compiled modules run eagerly, including their hooks."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode. Restore the mode of each module on any exit."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in was_training:
            module.training = True


@contextmanager
def gradients_set_aside(model: nn.Module) -> Iterator[None]:
    """Remove the caller's gradients from the model, and restore them on exit for the parameters that remain."""
    before = {p: p.grad for p in model.parameters()}
    for parameter in before:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in before.items():
            parameter.grad = gradient


@contextmanager
def same_random_numbers(seed: int = 0) -> Iterator[None]:
    """Seed all random number generators, and restore their states on any exit."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  the generator that user code has
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def random_states() -> dict[str, Any]:
    """Return the states of all random number generators as plain types and tensors, for `set_random_states`."""
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": apply_to_collection(numpy, np.ndarray, np.ndarray.tolist),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Set the states of all random number generators to those of `random_states`."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    torch.set_rng_state(states["torch"].clone())
    for device, state in enumerate(states["cuda"]):
        if device < torch.cuda.device_count():
            torch.cuda.set_rng_state(state.clone(), device)


@contextmanager
def no_cache(model: nn.Module) -> Iterator[None]:
    """Disable the key-value cache of transformers models. Restore each setting on any exit."""
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
