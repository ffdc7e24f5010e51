"""Digest of a batch of any type, by which a run that goes on knows the batches of the interrupted one."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np
from torch import Tensor

from zssvd_lightning.serialization.integrity import add_to_digest

_PLAIN = (str, bytes, bytearray, int, float, complex, bool, np.generic, type(None))


def add_batch(digest: Any, batch: Any) -> set[str]:
    """Add the content of a batch to a digest, and return the names of the types in it that have none to add.

    Content is that of tensors and arrays of NumPy, text, numbers and None, in nested mappings and sequences, and in
    the attributes of other objects.

    Args:
        digest: a digest of `hashlib`.
        batch: the batch.

    Raises:
        CalibrationError: the layout of a tensor cannot be compared; see `add_to_digest`.
    """
    unknown: set[str] = set()
    _add(digest, batch, unknown, ())
    return unknown


def _add(digest: Any, value: Any, unknown: set[str], within: tuple[int, ...]) -> None:
    """Add a value, and its parts in turn. `within` are the objects around it, which it may refer to."""
    digest.update(f"({type(value).__qualname__}".encode())
    if isinstance(value, Tensor):
        add_to_digest(digest, value)
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        digest.update(f"{value.dtype} {value.shape}".encode() + value.tobytes())
    elif isinstance(value, _PLAIN):
        digest.update(repr(value).encode("utf-8", "backslashreplace"))
    elif id(value) not in within:
        parts = _parts_of(value)
        if parts is None:
            unknown.add(type(value).__qualname__)
        for part in parts or ():
            _add(digest, part, unknown, (*within, id(value)))
    digest.update(b")")


def _parts_of(value: Any) -> list[Any] | None:
    """Return the parts of a value in a fixed order; None for an object without any that can be known."""
    if isinstance(value, Mapping):
        return [part for item in value.items() for part in item]
    if isinstance(value, np.ndarray):  # of objects
        return [list(value.shape), *value.ravel().tolist()]
    if isinstance(value, Sequence):
        return list(value)
    if isinstance(value, AbstractSet):
        return sorted(map(repr, value))
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    held = {name: getattr(value, name) for name in slots if hasattr(value, name)} | getattr(value, "__dict__", {})
    known = bool(held) and not callable(value) and not isinstance(value, type)
    return [part for item in held.items() for part in item] if known else None
