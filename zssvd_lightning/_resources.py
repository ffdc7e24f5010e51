"""Seconds and memory that a run takes."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class Stopwatch:
    """Timer that adds up the seconds of each step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        """Time the block as part of `step`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(step, time.perf_counter() - start)

    def add(self, step: str, seconds: float) -> None:
        """Add seconds to `step`."""
        self.seconds[step] = self.seconds.get(step, 0.0) + seconds


def resident_bytes(field: str = "VmRSS") -> int | None:
    """Return the resident memory of this process (bytes), or with `VmHWM` its peak. None where Linux does not tell."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None


def peak_rss_bytes() -> int:
    """Return the peak resident memory of this process (bytes), or 0 on systems that do not report it.

    On Linux, `getrusage` is not used first because its value includes the peak of the parent process.
    """
    if sys.platform == "win32":
        return 0
    if (found := resident_bytes("VmHWM")) is not None:
        return found
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
