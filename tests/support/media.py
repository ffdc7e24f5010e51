"""Media that hold tensors, for machines without an accelerator, and a disk that is full."""

import errno
import tempfile
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from zssvd_lightning.offload.media import HostMemory, ScratchFile


class OfAnAccelerator(HostMemory):
    """Host memory that takes every tensor for one of an accelerator, and so copies it both ways."""

    def get(self, held: Any) -> Tensor:
        return super().get(held).clone()

    def _moves(self, tensor: Tensor) -> bool:
        return True


class Full:
    """File on a disk that is full."""

    def seek(self, _):
        raise OSError(errno.ENOSPC, "No space left on device")


def fill_disk(monkeypatch: pytest.MonkeyPatch, folder: Path, writes: int) -> None:
    """Hold scratch files in a folder, and let the disk be full at a write, counted from 1."""
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    write, seen = ScratchFile._write, []

    def full(file, start, content):
        seen.append(start)
        if len(seen) == writes:
            file._file = Full()
        write(file, start, content)

    monkeypatch.setattr(ScratchFile, "_write", full)
