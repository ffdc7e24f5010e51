"""Memory of measurements: its peak, and errors that say that it is full."""

from contextlib import suppress
from pathlib import Path
from typing import Self

import torch

from zssvd_lightning._resources import resident_bytes


class PeakMemory:
    """Context that measures how far the memory of a device rises above its level at the start.

    On CUDA, these are bytes of tensors; on the CPU of Linux, bytes of resident memory.

    Args:
        device: device to measure.

    Attributes:
        risen: bytes above the level at the start, after the context. None on systems that do not tell.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.risen: int | None = None

    def __enter__(self) -> Self:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start: int | None = torch.cuda.memory_allocated(self.device)
        else:
            self._start = resident_bytes() if _forget_peak() else None
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            end: int | None = torch.cuda.max_memory_allocated(self.device)
        else:
            end = resident_bytes("VmHWM")
        if self._start is not None and end is not None:
            self.risen = max(0, end - self._start)


def is_full(error: BaseException) -> bool:
    """Return True if an error says that a device has no memory left."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _forget_peak() -> bool:
    """Set the peak of the resident memory of this process to what it holds now. Return False where this cannot be."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5)
        return True
    return False
