"""Number of training steps that fit into a time, from the seconds of the first steps."""

import time
from collections.abc import Callable

TIMED = 3
"""Number of steps whose seconds are measured. The step before them, which is often slower, is not counted."""


class Pace:
    """Clock of a recovery that is limited in time.

    Args:
        minutes: limit of the whole recovery, measurements on held-out batches included.
        now: function that returns seconds.
    """

    def __init__(self, minutes: float, now: Callable[[], float] = time.perf_counter) -> None:
        self._limit, self._now = 60 * minutes, now
        self._began: float | None = None
        self._first: tuple[int, float] | None = None
        self._measuring = 0.0

    def start(self) -> None:
        """Start the clock, unless it runs."""
        self._began = self._now() if self._began is None else self._began

    def measured(self, seconds: float) -> None:
        """Record the seconds of one measurement on the held-out batches."""
        self._measuring = seconds

    def steps(self, done: int, every: int | None) -> int | None:
        """Return the number of steps of the whole recovery, once enough were timed; None before. At least `done`.

        Args:
            done: number of finished steps, of which the last has just ended.
            every: number of steps between two measurements on held-out batches; None without.
        """
        now = self._now()
        if self._began is None:
            return None
        if self._first is None:
            self._first = (done, now) if done >= 1 else None
            return None
        before, began = self._first
        if done < before + TIMED:
            return None
        each = (now - began) / (done - before) + (self._measuring / every if every else 0.0)
        left = self._limit - (now - self._began) - self._measuring
        return done + max(0, int(left / each))
