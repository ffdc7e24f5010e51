"""A second model like a first one, which nothing is to be trained of: without its hooks, graphs and wrappers."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from zssvd_lightning.errors import TeacherError
from zssvd_lightning.modules import HOOKS, CompressedLinear, dense_like

STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
OF_WRAPPERS = ("__composable_api", "_compiled_call_impl")
"""Begin the names of attributes by which torch's wrappers find what they know of a module."""


def copied(model: nn.Module, dtype: torch.dtype, parameter: Callable[[nn.Parameter], Tensor]) -> nn.Module:
    """A model of the same structure, in evaluation mode, whose parameters require no gradients.

    Compressed layers become dense ones on the meta device.

    Args:
        model: any module; one that was given to `fully_shard` gives a plain one.
        dtype: of the copy's parameters.
        parameter: makes the values of the copy's parameter from those of the model's.
    """
    memo: dict[int, Any] = {}
    for value in model.parameters():
        memo[id(value)] = nn.Parameter(parameter(value).detach(), requires_grad=False)
    new = _copied(model, dtype, memo)
    nn.Module.eval(new)
    return new


def refuse_too_large(model: nn.Module, dtype: torch.dtype, processes: int = 1) -> None:
    """Raises TeacherError when the memory there is cannot hold a copy of the model's parameters.

    Args:
        model: that would be copied.
        dtype: of the copy.
        processes: that share it.
    """
    numbers = {id(p): p.numel() for p in model.parameters()}
    needed = sum(numbers.values()) * dtype.itemsize // processes
    device = next(model.parameters()).device
    free = free_bytes(device)
    if needed > free:
        raise TeacherError(
            f"a dense copy of {type(model).__name__} in {dtype} takes {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB "
            f"are free on {device}; write its predictions to a folder with save_predictions and give that as "
            "recovery.teacher, or train with loss 'own'"
        )


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) + torch.cuda.memory_reserved(device)
    import psutil

    return int(psutil.virtual_memory().available)


def _copied(module: nn.Module, dtype: torch.dtype, memo: dict[int, Any]) -> nn.Module:
    if id(module) in memo:
        already: nn.Module = memo[id(module)]
        return already
    if isinstance(module, CompressedLinear):
        return dense_like(module).to(dtype).requires_grad_(False)
    plain: Any = next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))
    new: nn.Module = plain.__new__(plain)
    memo[id(module)] = new
    state = new.__dict__
    for key, value in module.__dict__.items():
        if key in HOOKS or key in STATE_HOOKS:
            state[key] = None if isinstance(value, (bool, type(None))) else OrderedDict()
        elif key == "_modules":
            state[key] = {name: part if part is None else _copied(part, dtype, memo) for name, part in value.items()}
        elif not key.startswith(OF_WRAPPERS):
            state[key] = copy.deepcopy(value, memo)
    return new
