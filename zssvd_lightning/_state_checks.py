"""Checks of nested state that was read from a file: types, sizes and values, with the key of the first fault."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from zssvd_lightning.layers.base import is_finite

PARTS = "zssvd_parts"
"""Key of an entry that stands in a state for a sharded tensor, and the folder of a checkpoint that has its parts."""


Check = Callable[[Any, str], None]
"""Function of a value and its key, which raises `FaultError` if the value cannot be right."""


class FaultError(Exception):
    """Value in a saved state that cannot be right. The message names its key."""


def fault(key: str, value: object, wanted: str) -> FaultError:
    """Return the error for a value that is not as it was written."""
    shown = type(value).__name__ if isinstance(value, Mapping | list | tuple | Tensor) else repr(value)[:60]
    return FaultError(f"{key} is {shown}, but must be {wanted}")


def whole(value: Any, key: str) -> None:
    """Check an integer of 0 or more."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise fault(key, value, "an integer of 0 or more")


def number(value: Any, key: str) -> None:
    """Check a number, which may be infinite or NaN."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise fault(key, value, "a number")


def finite(value: Any, key: str) -> None:
    """Check a number that is neither infinite nor NaN."""
    number(value, key)
    if not math.isfinite(value):
        raise fault(key, value, "a finite number")


def positive(value: Any, key: str) -> None:
    """Check a number above 0, which may be infinite."""
    number(value, key)
    if not value > 0:
        raise fault(key, value, "a number above 0")


def yes_or_no(value: Any, key: str) -> None:
    """Check a boolean."""
    if not isinstance(value, bool):
        raise fault(key, value, "true or false")


def text(value: Any, key: str) -> None:
    """Check a string."""
    if not isinstance(value, str):
        raise fault(key, value, "a string")


def anything(value: Any, key: str) -> None:
    """Accept every value."""


def tensor(value: Any, key: str) -> None:
    """Check a tensor of any shape. A tensor that is saved in parts is not looked at."""
    if not isinstance(value, Tensor) and not _is_elsewhere(value):
        raise fault(key, value, "a tensor")


def finite_tensor(value: Any, key: str) -> None:
    """Check a tensor of floating-point numbers that are finite, where they are in memory."""
    tensor(value, key)
    held = value.to_local() if isinstance(value, DTensor) else value
    if isinstance(held, Tensor) and not held.is_meta and not is_finite(held):
        raise fault(key, value, "a tensor of finite floating-point numbers")


def shaped(value: Any, key: str, shape: tuple[int, ...]) -> None:
    """Check that a tensor, unless it is saved in parts, has a shape."""
    if isinstance(value, Tensor) and tuple(value.shape) != shape:
        raise FaultError(f"{key} has the shape {tuple(value.shape)}, but must have {shape}")


def optional(check: Check) -> Check:
    """Return a check that accepts None too."""

    def checked(value: Any, key: str) -> None:
        if value is not None:
            check(value, key)

    return checked


def listed(check: Check, length: int | None = None) -> Check:
    """Return a check of a list, of this length unless None, whose items pass `check`."""

    def checked(value: Any, key: str) -> None:
        if not isinstance(value, list | tuple) or length not in (None, len(value)):
            raise fault(key, value, "a list" if length is None else f"a list of {length}")
        for index, item in enumerate(value):
            check(item, f"{key}[{index}]")

    return checked


def mapped(check: Check) -> Check:
    """Return a check of a map from names to values that pass `check`."""

    def checked(value: Any, key: str) -> None:
        if not isinstance(value, Mapping):
            raise fault(key, value, "a map")
        for name, item in value.items():
            text(name, f"a key of {key}")
            check(item, f"{key}.{name}")

    return checked


def entries(checks: Mapping[str, Check], may_lack: tuple[str, ...] = ()) -> Check:
    """Return a check of a map that has these keys, except perhaps `may_lack`, with values that pass their checks."""

    def checked(value: Any, key: str) -> None:
        if not isinstance(value, Mapping):
            raise fault(key or "it", value, "a map")
        for name, check in checks.items():
            path = f"{key}.{name}" if key else name
            if name in value:
                check(value[name], path)
            elif name not in may_lack:
                raise FaultError(f"{path} is missing")

    return checked


def _is_elsewhere(value: object) -> bool:
    return isinstance(value, Mapping) and PARTS in value
