"""Turns of several candidates in one run, and medians with quartiles."""

from collections.abc import Iterator, Sequence
from statistics import median, quantiles
from typing import NamedTuple


class Quartiles(NamedTuple):
    """Median of repeated measurements, and the quartiles around it."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Quartiles":
        """Return the quartiles of one or more values, by linear interpolation between them.

        Example:
            >>> Quartiles.of([4.0, 1.0, 2.0, 3.0, 5.0])
            Quartiles(median=3.0, lower=2.0, upper=4.0)
        """
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        lower, _, upper = quantiles(values, n=4, method="inclusive")
        return cls(median(values), lower, upper)


def turns(names: Sequence[str], rounds: int) -> Iterator[list[str]]:
    """Yield the order of each round: all names once, each round from the next one on.

    A machine that slows down hits all candidates alike, and none always comes after the same other one.

    Example:
        >>> list(turns(["a", "b", "c"], 2))
        [['a', 'b', 'c'], ['b', 'c', 'a']]
    """
    for number in range(rounds):
        start = number % max(1, len(names))
        yield [*names[start:], *names[:start]]
