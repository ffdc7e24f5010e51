"""Calls of blocks: their arguments, taken apart into hidden states, which run through all blocks, and side tensors."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zssvd_lightning.errors import CalibrationError


class Slot(NamedTuple):
    """Place of a tensor in the arguments of a call."""

    number: int
    """Number of the side tensor in its batch, or `HIDDEN`."""


HIDDEN = -1
"""Number of the hidden states that come from the block before. Those of a first block are a side tensor."""


class BlockCall(NamedTuple):
    """Arguments of a block, with a `Slot` in place of every tensor, and the autocast around it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: tuple[str, torch.dtype, bool]
    """Type of device, type of the numbers, and whether it is on."""

    @classmethod
    def of(
        cls,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        hidden: Tensor | None,
        side: Callable[[Tensor], int],
        device: torch.device,
    ) -> "BlockCall":
        """Return a call without its tensors.

        Args:
            args: positional arguments.
            kwargs: keyword arguments.
            hidden: the hidden states among them, as the block before has returned them; None for the first block.
            side: function that stores any other tensor and returns its number.
            device: device of the block.
        """

        def slot(tensor: Tensor) -> Slot:
            return Slot(HIDDEN if tensor is hidden else side(tensor))

        kind = device.type
        autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        return cls(mapped(args, slot), mapped(dict(kwargs), slot), autocast)

    def with_tensors(self, tensor: Callable[[int], Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments, with the tensors that `tensor` returns for the numbers of their slots."""

        def back(slot: Slot) -> Tensor:
            return tensor(slot.number)

        return mapped(self.args, back, Slot), mapped(self.kwargs, back, Slot)

    @property
    def slots(self) -> list[int]:
        """Numbers of the slots, in the order of `tensors_of`."""
        found: list[int] = []
        mapped((self.args, self.kwargs), lambda slot: found.append(slot.number), Slot)
        return found

    @property
    def autocasting(self) -> AbstractContextManager[Any]:
        """Context with the autocast of the call."""
        kind, dtype, enabled = self.autocast
        return torch.autocast(kind, dtype, enabled=enabled)


def mapped(value: Any, change: Callable[[Any], Any], kind: type = Tensor) -> Any:
    """Return a nested value with `change` applied to all of type `kind` in its tuples, lists and dictionaries."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(each, change, kind) for each in value))
    if type(value) in (tuple, list):
        return type(value)(mapped(each, change, kind) for each in value)
    if type(value) is dict:
        return {key: mapped(each, change, kind) for key, each in value.items()}
    return value


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors that `mapped` reaches, in order."""
    found: list[Tensor] = []
    mapped(value, found.append)
    return found


def hidden_of(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], before: Tensor | None) -> Tensor:
    """Return the output of the block before among the arguments of block `name`, or else the first tensor.

    Raises:
        CalibrationError: there is no tensor.
    """
    found = tensors_of((args, dict(kwargs)))
    if not found:
        raise CalibrationError(f"{name} is called without hidden states; {WHOLE}")
    return next((tensor for tensor in found if tensor is before), found[0])


def output_of(name: str, output: Any) -> Tensor:
    """Return the hidden states in the output of block `name`: the output, or its first element.

    Raises:
        CalibrationError: the output is something else.
    """
    first = output[0] if isinstance(output, tuple | list) and len(output) > 0 else output
    if not isinstance(first, Tensor) or not first.is_floating_point():
        raise CalibrationError(f"{name} returns {type(output).__name__}, not hidden states first; {WHOLE}")
    return first


def with_output(output: Any, hidden: Tensor) -> Any:
    """Return the output of a block with other hidden states."""
    if isinstance(output, Tensor):
        return hidden
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(hidden, *output[1:])
    return type(output)([hidden, *output[1:]])


WHOLE = "set memory to 'whole'"
"""Remedy for models that cannot be run block by block."""
