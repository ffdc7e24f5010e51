"""Where a compression holds its tensors: beside the model, in host memory, or in scratch files."""

import mmap
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from functools import partial
from itertools import repeat
from threading import Lock
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from zssvd_lightning.errors import OutputError

V = TypeVar("V")
Held = TypeVar("Held")


class Store:
    """Maker of the mappings that hold what a compression keeps by layer: dictionaries."""

    def tensors(self) -> MutableMapping[str, Tensor]:
        """Return an empty mapping of tensors."""
        return {}

    def tuples(self, whole: Callable[..., V]) -> MutableMapping[str, V]:
        """Return an empty mapping of values that `whole` makes of their tensors."""
        return {}


class Medium(Protocol[Held]):
    """Medium that holds tensors."""

    def put(self, tensor: Tensor, over: Held | None) -> Held:
        """Hold a tensor, in place of `over` if that is given and has the same size."""

    def get(self, held: Held) -> Tensor:
        """Return a held tensor on its device. Changes to it are not kept, unless it is `put` again."""


class OnHost(NamedTuple):
    """Tensor in host memory."""

    tensor: Tensor
    device: torch.device
    """Device to which it is returned."""


class HostMemory:
    """Medium for tensors of accelerators, which are copied to the host. Tensors of the CPU stay what they are."""

    def put(self, tensor: Tensor, over: OnHost | None) -> OnHost:
        """Hold a tensor; see `Medium`."""
        tensor = tensor.detach()
        if not self._moves(tensor):
            return OnHost(tensor, tensor.device)
        if over is not None and over.tensor.shape == tensor.shape and over.tensor.dtype == tensor.dtype:
            return OnHost(over.tensor.copy_(tensor), tensor.device)
        return OnHost(tensor.to("cpu", copy=True), tensor.device)

    def get(self, held: OnHost) -> Tensor:
        """Return a held tensor; see `Medium`."""
        return held.tensor.to(held.device)

    def _moves(self, tensor: Tensor) -> bool:
        return tensor.device.type != "cpu"


class InFile(NamedTuple):
    """Place of a tensor in a scratch file, with all that is needed to read it."""

    start: int
    """Offset of the first byte, a multiple of `mmap.ALLOCATIONGRANULARITY`."""
    shape: torch.Size
    transposed: bool
    """True for a matrix that is stored, and lies in memory, column by column."""
    dtype: torch.dtype
    device: torch.device
    """Device to which it is returned."""

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.shape.numel() * self.dtype.itemsize


class ScratchFile:
    """Medium in a file, which is removed when it is no longer used.

    The file is in the folder for temporary files (`TMPDIR`). It has no name where the system allows it (POSIX), so that
    even a killed process leaves none behind. Tensors are read through a private memory map: only what is looked at is
    read, and only what is changed takes memory. They are written by system calls, so that a full disk is an error.
    """

    def __init__(self) -> None:
        self._file: Any = None
        self._end = 0
        self._lock = Lock()  # hooks of several devices run in several threads

    def put(self, tensor: Tensor, over: InFile | None) -> InFile:
        """Hold a tensor; see `Medium`. Raises OutputError if it cannot be written, as on a full disk."""
        tensor = tensor.detach()
        transposed = tensor.dim() == 2 and not tensor.is_contiguous() and tensor.T.is_contiguous()
        stored = tensor.T if transposed else tensor
        place = InFile(0, stored.shape, transposed, stored.dtype, stored.device)
        content = stored.cpu().contiguous().reshape(-1)
        with self._lock:
            start = over.start if over is not None and over.nbytes == place.nbytes else self._end
            if content.numel():
                self._write(start, content.view(torch.uint8).numpy().data)
            grain = mmap.ALLOCATIONGRANULARITY
            self._end = max(self._end, start + -(-place.nbytes // grain) * grain)
        return place._replace(start=start)

    def get(self, held: InFile) -> Tensor:
        """Return a held tensor; see `Medium`."""
        if held.nbytes:
            mapped = mmap.mmap(self._file.fileno(), held.nbytes, access=mmap.ACCESS_COPY, offset=held.start)
            content = torch.frombuffer(mapped, dtype=held.dtype)
        else:
            content = torch.empty(0, dtype=held.dtype)
        stored = content.reshape(held.shape).to(held.device)
        return stored.T if held.transposed else stored

    def _write(self, start: int, content: memoryview) -> None:
        size = len(content)
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="zssvd-", buffering=0)  # noqa: SIM115  closed by the finalizer
                weakref.finalize(self, self._file.close)
            self._file.seek(start)
            while content:
                content = content[self._file.write(content) :]
        except OSError as error:
            folder = tempfile.gettempdir()
            raise OutputError(
                f"offload 'disk' cannot write {size / 1e9:.2f} GB more to a scratch file in {folder}: {error} "
                f"({shutil.disk_usage(folder).free / 1e9:.2f} GB free); set the environment variable TMPDIR to a "
                "folder on a disk with more space"
            ) from error


class Offloaded(MutableMapping[str, V], Generic[V, Held]):
    """Mapping whose values consist of tensors in a medium. Store a value again after a change in place.

    Args:
        medium: holds the tensors.
        parts: function that takes a value apart into tensors.
        whole: function that makes a value of these tensors.
    """

    def __init__(self, medium: Medium[Held], parts: Callable[[V], Sequence[Tensor]], whole: Callable[..., V]) -> None:
        self._medium, self._parts, self._whole = medium, parts, whole
        self._held: dict[str, list[Held]] = {}
        self._shared = False

    def __getitem__(self, name: str) -> V:
        return self._whole(*map(self._medium.get, self._held[name]))

    def __setitem__(self, name: str, value: V) -> None:
        before = repeat(None) if self._shared or name not in self._held else self._held[name]
        self._held[name] = list(map(self._medium.put, self._parts(value), before))

    def __delitem__(self, name: str) -> None:
        del self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, name: object) -> bool:
        return name in self._held

    def __copy__(self) -> "Offloaded[V, Held]":
        """Return a mapping of the same values, which can then differ."""
        new = Offloaded(self._medium, self._parts, self._whole)
        new._held |= {name: list(held) for name, held in self._held.items()}
        self._shared = new._shared = True
        return new

    def clear(self) -> None:
        """Remove all values without reading them."""
        self._held.clear()


class Offloading(Store):
    """Maker of mappings in a medium.

    Args:
        medium: maker of the medium of one mapping.
    """

    def __init__(self, medium: Callable[[], Medium[Any]]) -> None:
        self._medium = medium

    def tensors(self) -> MutableMapping[str, Tensor]:
        """Return an empty mapping of tensors."""
        return Offloaded(self._medium(), lambda tensor: (tensor,), lambda tensor: tensor)

    def tuples(self, whole: Callable[..., V]) -> MutableMapping[str, V]:
        """Return an empty mapping of named tuples or dataclasses of tensors."""
        return Offloaded(self._medium(), _tensors_of, whole)


OFFLOADS: dict[str, Callable[[], Store]] = {
    "none": Store,
    "cpu": partial(Offloading, HostMemory),
    "disk": partial(Offloading, ScratchFile),
}
"""Makers of stores, by the names that the setting `offload` accepts."""


def _tensors_of(value: Any) -> Sequence[Tensor]:
    return value if isinstance(value, tuple) else tuple(vars(value).values())
