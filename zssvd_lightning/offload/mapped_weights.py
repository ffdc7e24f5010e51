"""Weights that are mapped from files, and a scratch file in which they change without a copy of them in memory.

A weight that is mapped privately from a file of safetensors takes no memory that the system could not take back, until
it is written: then each of its pages becomes a copy in memory. New values go to a scratch file instead, which is mapped
in its place.
"""

import mmap
from bisect import bisect_right
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from zssvd_lightning.offload.media import ScratchFile

MAPS = "/proc/self/maps"
"""List of the mappings of this process, on Linux."""


def mapped_from_files(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that are mapped privately from files; none where the system does not tell."""
    ranges: list[tuple[int, int]] = []
    with suppress(OSError):
        for line in Path(MAPS).read_text(encoding="utf-8", errors="replace").splitlines():
            addresses, permissions, _, _, inode, *_ = line.split()
            start, end = (int(address, 16) for address in addresses.split("-"))
            if inode != "0" and permissions.endswith("p"):
                ranges.append((start, end))
    ranges.sort()
    starts = [start for start, _ in ranges]
    found = []
    for name, tensor in tensors.items():
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu" and tensor.is_contiguous()
        if plain and tensor.nbytes:
            place = bisect_right(starts, tensor.data_ptr()) - 1
            if place >= 0 and tensor.data_ptr() + tensor.nbytes <= ranges[place][1]:
                found.append(name)
    return found


class WeightFile:
    """Scratch file with a place for each of some weights, mapped as a whole, so that it takes one mapping.

    Its pages are those of a file too, which `release_pages` takes out of memory. Nothing is written before the first
    `put`. For Linux, where a private mapping shows what is written to its file.

    Args:
        weights: the weights, in the memory of the CPU.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._places: dict[str, int] = {}
        self._size = 0
        for name, weight in weights.items():
            self._places[name] = self._size
            self._size += -(-weight.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._medium = ScratchFile()
        self._mapping: mmap.mmap | None = None

    def put(self, name: str, value: Tensor) -> Tensor:
        """Write a value of a weight, and return it as a tensor of the mapped file, which all earlier ones of it become.

        What was changed in those without this method is overwritten.

        Raises:
            OutputError: it cannot be written, as on a full disk.
        """
        start = self._places[name]
        if self._mapping is None:
            self._mapping = self._medium.mapped(self._size)
        content = value.detach().contiguous()
        self._medium.write_at(start, content)
        size = -(-content.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._mapping.madvise(mmap.MADV_DONTNEED, start, size)  # drops private copies of the pages of this weight alone
        numbers = torch.frombuffer(self._mapping, dtype=content.dtype, count=content.numel(), offset=start)
        return numbers.view(content.shape)
