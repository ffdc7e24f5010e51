"""Media that hold tensors: host memory and scratch files."""

import mmap
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from zssvd_lightning.errors import OutputError

Held = TypeVar("Held")

ALIGNMENT = 64
"""Bytes whose multiples are the offsets of tensors in a file, so that mapped numbers are aligned for any processor."""

_ANOTHER_FOLDER = "set the environment variable TMPDIR to a folder on a disk with more space"


class Medium(Protocol[Held]):
    """Medium that holds tensors."""

    def put(self, tensor: Tensor, over: Held | None) -> Held:
        """Hold a tensor, in place of `over` if that is given and has the same size."""

    def get(self, held: Held) -> Tensor:
        """Return a held tensor on its device. Changes to it are not kept, unless it is `put` again.

        The tensor is valid until another one is put over its place, so that it must not be used after that.
        """


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
    """Offset of the first byte, a multiple of `ALIGNMENT`."""
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


_ON_HOST: ContextVar[bool] = ContextVar("zssvd_on_host", default=False)


@contextmanager
def read_on_host() -> Iterator[None]:
    """Read tensors from scratch files within the context without moving them to their device, to be written again."""
    before = _ON_HOST.set(True)
    try:
        yield
    finally:
        _ON_HOST.reset(before)


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
            self._end = max(self._end, start + -(-place.nbytes // ALIGNMENT) * ALIGNMENT)
        return place._replace(start=start)

    def get(self, held: InFile) -> Tensor:
        """Return a held tensor; see `Medium`."""
        if held.nbytes:
            into_page = held.start % mmap.ALLOCATIONGRANULARITY
            page, size = held.start - into_page, into_page + held.nbytes
            mapped = mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_COPY, offset=page)
            content = torch.frombuffer(mapped, dtype=held.dtype, offset=into_page)
        else:
            content = torch.empty(0, dtype=held.dtype)
        stored = content.reshape(held.shape).to("cpu" if _ON_HOST.get() else held.device)
        return stored.T if held.transposed else stored

    def mapped(self, size: int) -> mmap.mmap:
        """Return a private mapping of the first `size` bytes, which `write_at` fills. Errors as in `put`."""
        with self._lock, self._explained(size):
            self._open().truncate(size)
            return mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_COPY)

    def write_at(self, start: int, content: Tensor) -> None:
        """Write a contiguous tensor of the CPU at an offset. Errors as in `put`."""
        with self._lock:
            self._write(start, content.reshape(-1).view(torch.uint8).numpy().data)

    def _open(self) -> Any:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="zssvd-", buffering=0)  # noqa: SIM115  closed by the finalizer
            weakref.finalize(self, self._file.close)
        return self._file

    def _write(self, start: int, content: memoryview) -> None:
        with self._explained(len(content)):
            file = self._open()
            file.seek(start)
            while content:
                content = content[file.write(content) :]

    @contextmanager
    def _explained(self, size: int) -> Iterator[None]:
        """Turn errors of the system into an OutputError that says how many bytes were to be written."""
        try:
            yield
        except OSError as error:
            folder = tempfile.gettempdir()
            raise OutputError(
                f"cannot write {size / 1e9:.2f} GB more to scratch files in {folder}: {error} "
                f"({free_disk() / 1e9:.2f} GB free); the model is as it was. {_ANOTHER_FOLDER}"
            ) from error


def free_disk() -> int:
    """Return the bytes that are free for scratch files."""
    return shutil.disk_usage(tempfile.gettempdir()).free


def refuse_too_little(needed: int, setting: str = "memory 'blocks'") -> None:
    """Raise OutputError if the disk has no room for scratch files of `needed` bytes, which a setting asks for."""
    folder, free = tempfile.gettempdir(), free_disk()
    if needed > free:
        raise OutputError(
            f"{setting} needs up to {needed / 1e9:.2f} GB of scratch files in {folder}, where "
            f"{free / 1e9:.2f} GB are free; the model is as it was. {_ANOTHER_FOLDER}"
        )
