"""Release of the memory of weights that are mapped from a file, as those of safetensors are.

Mapped weights become resident as they are read, and stay so while the system has other memory to give. Linux tells of
each page whether it is still that of the file. Such a page has nothing that the file has not, so that it can be let go,
and is read again when it is needed. A page that was written is a private copy, which is left alone.
"""

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

PAGEMAP = "/proc/self/pagemap"
"""File with 8 bytes for each page of this process."""

PRESENT, OF_FILE = np.uint64(1 << 63), np.uint64(1 << 61)
"""Bits in it: the page is resident; it is that of a file or of shared memory, and no private copy."""

AT_ONCE = 2**18
"""Pages that are looked up at once (1 GiB)."""


def release_pages(tensors: Iterable[Tensor]) -> int:
    """Take the pages of mapped tensors out of resident memory, and return how many bytes they had.

    No value changes: pages that were written since they were read from the file stay, as does memory that no file is
    mapped to. No other thread may write to the tensors meanwhile. Tensors on other devices are left alone. Where the
    system does not tell which pages are those of a file (other than Linux), nothing is released.

    Args:
        tensors: the tensors, such as the parameters of a block.
    """
    return _released_of(filter(None, map(_extent_of, tensors)))


def release_pages_of(content: memoryview) -> int:
    """Take the pages of bytes out of resident memory where they are mapped from a file; see `release_pages`."""
    if not content.nbytes:
        return 0
    return _released_of([_pages(np.frombuffer(content, np.uint8).ctypes.data, content.nbytes)])


def _released_of(extents: Iterable[tuple[int, int]]) -> int:
    """Release the pages of files in extents, and return their bytes."""
    extents = _merged(extents) if sys.platform.startswith("linux") else []
    if not extents:
        return 0
    try:
        pages = os.open(PAGEMAP, os.O_RDONLY)
    except OSError:
        return 0
    try:
        return sum(_released(pages, *extent) for extent in extents)
    finally:
        os.close(pages)


@contextmanager
def released_behind(model: nn.Module) -> Iterator[None]:
    """Release the pages of each block of a model as soon as it has run forward, within the context.

    Blocks are the items of all lists of modules. See `release_pages`.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    blocks = {item for items in lists if len(items) > 1 for item in items}

    def release(module: nn.Module, args: Any, output: Any) -> None:
        if module in blocks:
            release_pages(module.parameters())

    handle = register_module_forward_hook(release)  # of all modules, so that none of the model counts as hooked
    try:
        yield
    finally:
        handle.remove()


def _extent_of(tensor: Tensor) -> tuple[int, int] | None:
    """Return the numbers of the first page of a tensor and of the one after its last; None if it is not in memory."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and tensor.device.type == "cpu"
    if not plain or not tensor.numel() or not tensor.data_ptr():
        return None
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return _pages(tensor.data_ptr(), (last + 1) * tensor.element_size())


def _pages(address: int, size: int) -> tuple[int, int]:
    """Return the number of the first page of some bytes, and that of the page after the last."""
    return address // mmap.PAGESIZE, -(-(address + size) // mmap.PAGESIZE)


def _merged(extents: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return extents in order, those that touch as one."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(extents):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def _released(pages: int, start: int, end: int) -> int:
    """Release the pages of files from page `start` to page `end`, and return their bytes."""
    released = 0
    for first in range(start, end, AT_ONCE):
        count = min(AT_ONCE, end - first)
        try:
            bits = np.frombuffer(os.pread(pages, 8 * count, 8 * first), np.uint64)
        except OSError:
            break
        clean = (bits & (PRESENT | OF_FILE)) == (PRESENT | OF_FILE)
        edges = np.flatnonzero(np.diff(clean, prepend=False, append=False))
        for run, after in edges.reshape(-1, 2).tolist():
            released += _let_go((first + run) * mmap.PAGESIZE, (after - run) * mmap.PAGESIZE)
    return released


def _let_go(address: int, size: int) -> int:
    """Let go of pages, and return their bytes; 0 if they cannot be let go, as where they are locked."""
    advise = ctypes.CDLL(None).madvise
    advise.argtypes, advise.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return 0 if advise(address, size, mmap.MADV_DONTNEED) else size
