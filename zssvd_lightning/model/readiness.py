"""Checks that a model can be compressed where it is: its weights are here, plain, and can have gradients."""

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from zssvd_lightning.errors import CalibrationError, TargetError


def refuse_unready(model: nn.Module) -> None:
    """Raise an error if a model cannot run forward and backward where it is. Nothing is changed.

    Raises:
        TargetError: it is no module, or a weight or buffer is not in memory, not initialized, or was made in inference
            mode. The message names it.
        CalibrationError: the call is within `torch.inference_mode`.
    """
    if not isinstance(model, nn.Module):
        raise TargetError(f"the model is of type {type(model).__name__}, but must be a torch.nn.Module")
    if torch.is_inference_mode_enabled():
        raise CalibrationError(
            "gradients cannot be taken within torch.inference_mode; call this outside of it (torch.no_grad is fine)"
        )
    refuse_uninitialized(model)
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if (reason := _unready(tensor, offloaded=_is_offloaded(model, name))) is not None:
            raise TargetError(f"{name} {reason}")


def refuse_uninitialized(model: nn.Module) -> None:
    """Raise TargetError, which names it, if a weight or buffer has no shape yet, as in `nn.LazyLinear`."""
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            raise TargetError(f"{name} has no shape yet; run one batch through the model before it is compressed")


def is_quantized(module: nn.Module) -> bool:
    """Return True if the weight of a linear layer holds codes instead of numbers.

    Such weights are tensors of a type of their own or parameters of another shape, or have numbers of one byte or of no
    floating point.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or isinstance(weight, UninitializedParameter):
        return False
    shape = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    whole = issubclass(type(weight), nn.Parameter) and tuple(weight.shape) == shape
    plain = whole or type(weight) in (Tensor, nn.Parameter, DTensor)
    return not plain or not weight.is_floating_point() or weight.dtype.itemsize < 2


def _unready(tensor: Tensor, *, offloaded: bool) -> str | None:
    """Return why a weight or buffer cannot be used, or None."""
    if tensor.is_meta and offloaded:
        return (
            "is offloaded to the memory of the CPU or to disk, from where a hook loads it for each call; load the "
            "model without device_map, or with one that offloads nothing"
        )
    if tensor.is_meta:
        return "is on the meta device, so it has no values; load the weights first"
    if tensor.is_inference():
        return (
            "was made in torch.inference_mode, so it can have no gradient; load the model outside of it, or replace "
            "the tensor by a clone made outside of it"
        )
    return None


def _is_offloaded(model: nn.Module, name: str) -> bool:
    """Return True if the module of a tensor, or a module around it, has a hook that offloads weights."""
    return any(_offloads(getattr(module, "_hf_hook", None)) for module in _path(model, name.rpartition(".")[0]))


def _offloads(hook: object) -> bool:
    return bool(getattr(hook, "offload", False)) or any(map(_offloads, getattr(hook, "hooks", ())))


def _path(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """Yield the model, and every module on the way to the one of that name."""
    yield model
    parts = name.split(".") if name else []
    for end in range(1, len(parts) + 1):
        yield model.get_submodule(".".join(parts[:end]))
