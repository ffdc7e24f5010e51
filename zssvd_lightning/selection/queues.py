"""Queues of the components that matrices would drop next: which of them goes first."""

import heapq
from collections.abc import Callable
from typing import NamedTuple, Protocol


class Candidate(NamedTuple):
    """The component that a matrix would drop next."""

    matrix: int
    """Its place among the matrices."""
    sigma: float
    """Singular value."""
    delta: float
    """Predicted change of the loss, to first order."""
    second_order: float
    """Its second-order part."""
    cost: float
    """Of a component of this matrix, on average."""


Key = Callable[[Candidate], float]


class Queue(Protocol):
    """Holds one offer a matrix and says which to take next; ties go to the earlier matrix."""

    def offer(self, offer: Candidate) -> None:
        """Adds an offer."""

    def take(self) -> int:
        """Removes an offer and returns its matrix. Raises IndexError when there is none."""


class SmallestFirst:
    """Takes the offer with the smallest key."""

    def __init__(self, key: Key) -> None:
        self._key = key
        self._heap: list[tuple[float, int]] = []

    def offer(self, offer: Candidate) -> None:
        """See `Queue`."""
        heapq.heappush(self._heap, (self._key(offer), offer.matrix))

    def take(self) -> int:
        """See `Queue`."""
        return heapq.heappop(self._heap)[1]


class ZeroSum:
    """Takes the smallest offer of the sign that brings the running sum of delta back to zero (arXiv 2602.02848)."""

    def __init__(self, size: Key) -> None:
        self._size = size
        self._rising: list[tuple[float, int, float]] = []
        self._falling: list[tuple[float, int, float]] = []
        self._drift = 0.0

    def offer(self, offer: Candidate) -> None:
        """See `Queue`."""
        side = self._rising if offer.delta >= 0 else self._falling
        heapq.heappush(side, (self._size(offer), offer.matrix, offer.delta))

    def take(self) -> int:
        """See `Queue`."""
        rise = bool(self._rising) and (self._drift <= 0 or not self._falling)
        _, matrix, delta = heapq.heappop(self._rising if rise else self._falling)
        self._drift += delta
        return matrix
