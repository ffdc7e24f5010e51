"""Seconds, memory and the display of the progress of long steps."""

import ctypes
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Protocol, TypeVar

from tqdm.auto import tqdm


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


def trim_heap() -> bool:
    """Give freed memory that the C library holds on to back to the system. Return False where it cannot (not glibc).

    Blocks of many sizes that are allocated and freed in turn leave gaps between what stays in use, which otherwise
    count as resident memory until the end of the process.
    """
    if not sys.platform.startswith("linux"):
        return False
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim is not None and bool(trim(0))


T = TypeVar("T")

Advance = Callable[[int], object]
"""Function that is called with the number of units that were completed."""


class Display(Protocol):
    """Function that opens the display of a step."""

    def __call__(self, title: str, total: int | None, unit: str) -> AbstractContextManager[Advance]:
        """Return a context, within which the step runs and calls the function that it yields.

        Args:
            title: name of the step.
            total: number of units; None if it is not known.
            unit: name of a unit, such as `layer`.
        """


@contextmanager
def tqdm_bar(title: str, total: int | None, unit: str) -> Iterator[Advance]:
    """Draw a bar on stderr while a step runs. Arguments: see `Display`."""
    with tqdm(total=total, desc=title, unit=unit) as bar:
        yield bar.update


@contextmanager
def nothing(title: str, total: int | None, unit: str) -> Iterator[Advance]:
    """Show nothing. Arguments: see `Display`."""
    yield lambda done: None


_DISPLAY: ContextVar[Display] = ContextVar("zssvd_display", default=tqdm_bar)


@contextmanager
def shown_by(display: Display) -> Iterator[None]:
    """Show the steps within the context by a display. On exit, the previous one is set again."""
    before = _DISPLAY.get()
    _DISPLAY.set(display)
    try:
        yield
    finally:
        _DISPLAY.set(before)


def current_display() -> Display:
    """Return the display that is set."""
    return _DISPLAY.get()


def step_shown(title: str, total: int | None, unit: str, *, shown: bool) -> AbstractContextManager[Advance]:
    """Open the display of a step, or one that shows nothing unless `shown`. Other arguments: see `Display`."""
    return (_DISPLAY.get() if shown else nothing)(title, total, unit)


def counted(items: Iterable[T], title: str, total: int | None, unit: str, *, shown: bool) -> Iterator[T]:
    """Yield items, and count each once the next one is asked for. Other arguments: see `step_shown`."""
    with step_shown(title, total, unit, shown=shown) as advance:
        for item in items:
            yield item
            advance(1)
