"""Scratch files: tensors on disk that end with the process, and mappings of tensors kept there.

The files have no name where the system allows it (POSIX), so that even a killed process leaves none behind.
"""

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from zssvd_lightning.errors import OutputError

V = TypeVar("V")


class Place(NamedTuple):
    """Place of a tensor in a `TensorFile`, with all that is needed to read it."""

    start: int
    """Offset of the first byte."""
    shape: torch.Size
    transposed: bool
    """True for a matrix that is stored, and lies in memory, column by column."""
    dtype: torch.dtype
    device: torch.device
    """Device to which it is read."""


class TensorFile:
    """File to which tensors are appended. It is removed when it is no longer used.

    Raises:
        OutputError: the file cannot be created, as without a writable folder for temporary files.
    """

    def __init__(self) -> None:
        try:
            self._file = tempfile.TemporaryFile(prefix="zssvd-", buffering=0)  # noqa: SIM115  closed by the finalizer
        except OSError as error:
            raise OutputError(f"memory 'blocks' needs scratch files: {error}; {_ANOTHER_FOLDER}") from error
        self._end = 0
        self._closing = weakref.finalize(self, self._file.close)

    def append(self, tensor: Tensor) -> Place:
        """Write a tensor. Raises OutputError if the disk is full."""
        transposed = tensor.dim() == 2 and not tensor.is_contiguous() and tensor.T.is_contiguous()
        stored = tensor.detach().T if transposed else tensor.detach()
        place = Place(self._end, stored.shape, transposed, stored.dtype, stored.device)
        content = stored.cpu().contiguous().reshape(-1)
        if content.numel():
            try:
                self._file.seek(self._end)
                left = content.view(torch.uint8).numpy().data
                while left:
                    left = left[self._file.write(left) :]
            except OSError as error:
                folder = tempfile.gettempdir()
                raise OutputError(
                    f"memory 'blocks' cannot write {content.nbytes / 1e9:.2f} GB more to its scratch files in "
                    f"{folder}: {error} ({shutil.disk_usage(folder).free / 1e9:.2f} GB free); the model is as it was. "
                    f"{_ANOTHER_FOLDER}"
                ) from error
        self._end += content.nbytes
        return place

    def read(self, place: Place) -> Tensor:
        """Return the tensor that was written to `place`."""
        content = torch.empty(place.shape.numel() * place.dtype.itemsize, dtype=torch.uint8)
        if content.numel():
            self._file.seek(place.start)
            left = content.numpy().data
            while left:
                left = left[self._file.readinto(left) :]
        stored = content.view(place.dtype).reshape(place.shape).to(place.device)
        return stored.T if place.transposed else stored


def refuse_too_little(needed: int) -> None:
    """Raise OutputError if the disk has no room for scratch files of `needed` bytes."""
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(
            f"memory 'blocks' needs up to {needed / 1e9:.2f} GB of scratch files in {folder}, where "
            f"{free / 1e9:.2f} GB are free; the model is as it was. {_ANOTHER_FOLDER}"
        )


_ANOTHER_FOLDER = "set the environment variable TMPDIR to a folder on a disk with more space"


class OnDisk(MutableMapping[str, V]):
    """Mapping whose values consist of tensors in a file, and are read anew each time. Copies share the file.

    Args:
        parts: function that takes a value apart into tensors.
        whole: function that makes a value of these tensors.
    """

    def __init__(
        self, parts: Callable[[V], Sequence[Tensor]], whole: Callable[..., V], file: TensorFile | None = None
    ) -> None:
        self._parts, self._whole = parts, whole
        self._file = TensorFile() if file is None else file
        self._places: dict[str, list[Place]] = {}

    def __getitem__(self, name: str) -> V:
        return self._whole(*map(self._file.read, self._places[name]))

    def __setitem__(self, name: str, value: V) -> None:
        self._places[name] = [self._file.append(part) for part in self._parts(value)]

    def __delitem__(self, name: str) -> None:
        del self._places[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __copy__(self) -> "OnDisk[V]":
        """Return a mapping of the same values, which can then differ. The file stays until neither uses it."""
        new = OnDisk(self._parts, self._whole, self._file)
        new._places |= self._places
        return new

    def clear(self) -> None:
        """Remove all values without reading them."""
        self._places.clear()


class InMemory:
    """Maker of the mappings that hold what a compression keeps by layer: dictionaries."""

    def tensors(self) -> MutableMapping[str, Tensor]:
        """Return an empty mapping of tensors."""
        return {}

    def tuples(self, whole: Callable[..., V]) -> MutableMapping[str, V]:
        """Return an empty mapping of values that `whole` makes of their tensors."""
        return {}


class InScratchFiles(InMemory):
    """Maker of mappings in scratch files."""

    def tensors(self) -> MutableMapping[str, Tensor]:
        """Return an empty mapping of tensors in a new file."""
        return OnDisk(lambda tensor: (tensor,), lambda tensor: tensor)

    def tuples(self, whole: Callable[..., V]) -> MutableMapping[str, V]:
        """Return an empty mapping in a new file, of values that yield their tensors one by one."""
        return OnDisk(lambda value: tuple(_tensors_of(value)), whole)


def _tensors_of(value: Any) -> Sequence[Tensor]:
    return value if isinstance(value, tuple) else tuple(vars(value).values())
