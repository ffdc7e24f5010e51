"""Priority queues that choose which matrix drops its next components."""

import heapq
from collections.abc import Callable
from typing import NamedTuple, Protocol


class Candidate(NamedTuple):
    """Components that a matrix would drop next, all or none of them: a single one, or one step of its rank.

    Means are over these components.
    """

    matrix: int
    """Index of the matrix."""
    components: int
    """Number of components."""
    sigma: float
    """Mean singular value."""
    delta: float
    """Predicted first-order change of the loss from dropping them: the sum over the components."""
    magnitude: float
    """Mean absolute value of the first-order change of a component."""
    second_order: float
    """Mean second-order change of the loss from dropping a component."""
    cost: float
    """Mean cost of a component of this matrix."""


Key = Callable[[Candidate], float]
"""Function that gives the priority of a candidate; the smallest goes first."""


class Queue(Protocol):
    """Priority queue with one candidate per matrix. Ties go to the earlier matrix."""

    def offer(self, offer: Candidate) -> None:
        """Add a candidate."""

    def take(self) -> int:
        """Remove the next candidate and return the index of its matrix.

        Raises:
            IndexError: the queue is empty.
        """


class SmallestFirst:
    """Queue that takes the candidate with the smallest key."""

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
    """Queue that keeps the running sum of delta near zero (arXiv 2602.02848).

    It takes the candidate with the smallest key among those whose sign of delta brings the sum back toward zero.
    Components that are dropped together count by the sum of their deltas.
    """

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
