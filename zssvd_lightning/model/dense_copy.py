"""Frozen copy of a model, without its hooks, graphs and wrappers."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from zssvd_lightning.errors import TeacherError
from zssvd_lightning.layers.base import HOOKS, CompressedLinear
from zssvd_lightning.layers.registry import dense_like

STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
"""Attributes in which `nn.Module` stores its state-dict hooks."""


OF_WRAPPERS = ("__composable_api", "_compiled_call_impl")
"""Prefixes of the attributes in which torch's wrappers store their state of a module."""


COMPILED = "_orig_mod."
"""Prefix that `torch.compile` adds to the names in a module it wraps."""


INSTEAD = "write its predictions with save_predictions and give the folder as recovery.teacher"
"""Alternative to a copy, for error messages."""


def copied(model: nn.Module, dtype: torch.dtype, parameter: Callable[[nn.Parameter], Tensor]) -> nn.Module:
    """Return a copy of the model in evaluation mode, whose parameters require no gradients.

    Compressed layers become dense layers on the meta device. Compiled modules become the original modules.

    Args:
        model: any module. A module that was given to `fully_shard` becomes a plain one.
        dtype: type of the dense layers that replace compressed ones.
        parameter: function that returns the copy's value for a parameter of the model.

    Raises:
        TeacherError: a module or parameter cannot be copied. The message names it.
    """
    memo: dict[int, Any] = {}
    kept = dict(_kept(model))
    for name, module in kept.items():
        memo |= {id(p): _frozen(f"{name}.{leaf}", p, parameter) for leaf, p in module.named_parameters(recurse=False)}
        memo[id(module)] = object.__new__(next(c for c in type(module).__mro__ if not issubclass(c, FSDPModule)))
    memo |= {id(m): _dense(m, dtype) for m in model.modules() if isinstance(m, CompressedLinear)}
    memo |= {id(m): memo[id(m._orig_mod)] for m in model.modules() if isinstance(m, OptimizedModule)}  # noqa: SLF001
    for name, module in kept.items():
        try:
            memo[id(module)].__setstate__(_state_of(module, memo))
        except Exception as error:
            where = f"{name or 'the model'} ({type(module).__name__})"
            raise TeacherError(f"{where} cannot be copied: {error}; {INSTEAD}") from error
    new: nn.Module = memo[id(model)]
    nn.Module.eval(new)
    _use_no_cache(new)
    return new


def refuse_too_large(model: nn.Module, dtype: torch.dtype, processes: int = 1) -> None:
    """Raise TeacherError if a copy of the model's parameters does not fit into the free memory.

    Args:
        model: model to copy.
        dtype: type of the copy's parameters.
        processes: number of processes that share the copy.

    Raises:
        TeacherError: the copy does not fit.
    """
    needed = sum({id(p): p.numel() for p in model.parameters()}.values()) * dtype.itemsize // processes
    device = next(model.parameters()).device
    free = free_bytes(device)
    if needed > free:
        raise TeacherError(
            f"a dense copy of {type(model).__name__} in {dtype} takes {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB "
            f"are free on {device}; {INSTEAD}, or train with loss 'own'"
        )


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a device, in bytes, including the unused part of the CUDA cache."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    import psutil

    return int(psutil.virtual_memory().available)


def _frozen(name: str, value: nn.Parameter, parameter: Callable[[nn.Parameter], Tensor]) -> nn.Parameter:
    if not value.is_floating_point():
        raise TeacherError(f"{name} is {value.dtype}: quantized models are not copied; {INSTEAD}")
    return nn.Parameter(parameter(value).detach(), requires_grad=False)


def _dense(layer: CompressedLinear, dtype: torch.dtype) -> nn.Module:
    return dense_like(layer).to(dtype).requires_grad_(False)


def _use_no_cache(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and "use_cache" in module.config.to_dict():
            module.config.use_cache = False


def _kept(model: nn.Module, prefix: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Yield the name and module of all modules copied as their own type: no compressed layers or compile wrappers."""
    seen = set() if seen is None else seen
    if id(model) in seen or isinstance(model, CompressedLinear):
        return
    seen.add(id(model))
    if not isinstance(model, OptimizedModule):
        yield prefix, model
    for name, part in model.named_children():
        yield from _kept(part, f"{prefix}.{name}" if prefix else name, seen)


def _state_of(module: nn.Module, memo: dict[int, Any]) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for key, value in module.__getstate__().items():  # type: ignore[no-untyped-call]
        if key in HOOKS or key in STATE_HOOKS:
            state[key] = None if isinstance(value, (bool, type(None))) else OrderedDict()
        elif isinstance(value, Tensor) and id(value) not in memo:
            state[key] = value.detach().clone()
        elif not key.startswith(OF_WRAPPERS):
            state[key] = copy.deepcopy(value, memo)
    return state
