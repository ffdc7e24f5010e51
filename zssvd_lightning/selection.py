"""Rules that choose, for the whole model at once, which components to give up.

A rule sees each matrix as a list of components (sigma descending, delta the predicted change of the loss when one is
dropped) and returns which are kept. The greedy rules differ in the order a matrix offers its components in and in
whose offer is taken next; everything else is `_drop_until_met`, written once.
"""

import heapq
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from zssvd_lightning.budget import Budget
from zssvd_lightning.errors import BudgetError


@dataclass(frozen=True)
class Components:
    """One matrix, as selection sees it."""

    sigma: Tensor
    """Singular values (r,), descending."""
    delta: Tensor
    """Predicted change of the loss (r,) when a component is dropped."""


@dataclass(frozen=True)
class Selection:
    """What stays."""

    kept: Mapping[str, Tensor | None]
    """Name -> ascending indices (k,) of the components that stay; None where the matrix stays dense."""
    drifts: Mapping[str, float]
    """Name -> sum of delta over what is dropped of it."""

    @property
    def predicted_drift(self) -> float:
        """Sum of delta over everything dropped."""
        return sum(self.drifts.values())

    def rank(self, name: str) -> int | None:
        """How many components of `name` stay, or None where it stays dense."""
        kept = self.kept[name]
        return None if kept is None else len(kept)


Rule = Callable[[Mapping[str, Components], Budget], Selection]


class Queue(Protocol):
    """Holds one offer a matrix and says which to take next; ties go to the earlier matrix."""

    def offer(self, matrix: int, sigma: float, delta: float) -> None:
        """Adds the component that `matrix` would drop next."""

    def take(self) -> int:
        """Removes an offer and returns its matrix. Raises IndexError when there is none."""


class SmallestFirst:
    """Takes the offer with the smallest key."""

    def __init__(self, key: Callable[[float, float], float]) -> None:
        self._key = key
        self._heap: list[tuple[float, int]] = []

    def offer(self, matrix: int, sigma: float, delta: float) -> None:
        """See `Queue`."""
        heapq.heappush(self._heap, (self._key(sigma, delta), matrix))

    def take(self) -> int:
        """See `Queue`."""
        return heapq.heappop(self._heap)[1]


class ZeroSum:
    """Takes the smallest offer of the sign that brings the running sum of delta back to zero (arXiv 2602.02848)."""

    def __init__(self) -> None:
        self._rising: list[tuple[float, int]] = []
        self._falling: list[tuple[float, int]] = []
        self._drift = 0.0

    def offer(self, matrix: int, sigma: float, delta: float) -> None:
        """See `Queue`."""
        heapq.heappush(self._rising if delta >= 0 else self._falling, (abs(delta), matrix))

    def take(self) -> int:
        """See `Queue`."""
        rise = bool(self._rising) and (self._drift <= 0 or not self._falling)
        size, matrix = heapq.heappop(self._rising if rise else self._falling)
        self._drift += size if rise else -size
        return matrix


def zero_sum(matrices: Mapping[str, Components], budget: Budget) -> Selection:
    """The paper's rule: two heaps, and a running sum of delta that is kept near zero (arXiv 2602.02848)."""
    return _drop_until_met(matrices, budget, ZeroSum())


def abs_delta(matrices: Mapping[str, Components], budget: Budget) -> Selection:
    """Smallest |delta| first, each matrix offering only its smallest remaining sigma."""
    return _drop_until_met(matrices, budget, SmallestFirst(lambda sigma, delta: abs(delta)))


def abs_delta_unordered(matrices: Mapping[str, Components], budget: Budget) -> Selection:
    """Smallest |delta| first, whatever its sigma: what is left of a matrix need not be a truncation of it."""
    return _drop_until_met(matrices, budget, SmallestFirst(lambda sigma, delta: abs(delta)), _by_abs_delta)


def most_negative(matrices: Mapping[str, Components], budget: Budget) -> Selection:
    """Smallest signed delta first: what promises to lower the loss most."""
    return _drop_until_met(matrices, budget, SmallestFirst(lambda sigma, delta: delta))


def sigma(matrices: Mapping[str, Components], budget: Budget) -> Selection:
    """Smallest singular value first, over all matrices."""
    return _drop_until_met(matrices, budget, SmallestFirst(lambda sigma, delta: sigma))


def uniform(matrices: Mapping[str, Components], budget: Budget) -> Selection:
    """The same fraction of every matrix, for factors `k = floor((1 - prune_ratio) m n / (m + n))`.

    As SVD-LLM does (arXiv 2403.07378).
    """
    ranks = {}
    for name, (m, n) in budget.shapes.items():
        allowed = (1 - budget.prune_ratio) * m * n + 1e-9
        ranks[name] = bisect_right(range(min(m, n) + 1), allowed, key=partial(budget.stored, name)) - 1
        if ranks[name] < budget.floor(name):
            raise BudgetError(
                f"uniform ranks give {name} ({m}, {n}) rank {ranks[name]}, below its floor {budget.floor(name)}; "
                "lower min_rank_fraction or prune_ratio, or use a global selection"
            )
    return of_ranks(matrices, budget, ranks)


def of_ranks(matrices: Mapping[str, Components], budget: Budget, ranks: Mapping[str, int]) -> Selection:
    """So many of the largest components of each matrix."""
    return _selection(matrices, budget, {name: torch.arange(rank) for name, rank in ranks.items()})


RULES: dict[str, Rule] = {
    rule.__name__: rule for rule in (zero_sum, abs_delta, abs_delta_unordered, most_negative, sigma, uniform)
}


def _by_sigma(components: Components) -> Tensor:
    return torch.arange(len(components.sigma) - 1, -1, -1)


def _by_abs_delta(components: Components) -> Tensor:
    return torch.argsort(components.delta.abs(), stable=True)


def _drop_until_met(
    matrices: Mapping[str, Components],
    budget: Budget,
    queue: Queue,
    drop_order: Callable[[Components], Tensor] = _by_sigma,
) -> Selection:
    """Drops one component after another until the budget is met. A matrix offers one at a time, in `drop_order`."""
    names = list(matrices)
    orders = [drop_order(matrices[name]).tolist() for name in names]
    sigmas = [matrices[name].sigma.tolist() for name in names]
    deltas = [matrices[name].delta.tolist() for name in names]
    ranks = [len(order) for order in orders]
    floors = [budget.floor(name) for name in names]

    def offer(i: int) -> None:
        if ranks[i] > floors[i]:
            component = orders[i][len(orders[i]) - ranks[i]]
            queue.offer(i, sigmas[i][component], deltas[i][component])

    for i in range(len(names)):
        offer(i)
    removed = budget.total - sum(budget.stored(name, rank) for name, rank in zip(names, ranks, strict=True))
    while removed < budget.to_remove:
        i = queue.take()
        removed += budget.stored(names[i], ranks[i]) - budget.stored(names[i], ranks[i] - 1)
        ranks[i] -= 1
        offer(i)
    kept = {
        name: torch.tensor(sorted(order[len(order) - rank :]), dtype=torch.long)
        for name, order, rank in zip(names, orders, ranks, strict=True)
    }
    return _selection(matrices, budget, kept)


def _selection(matrices: Mapping[str, Components], budget: Budget, kept: Mapping[str, Tensor]) -> Selection:
    """Returns matrices above break-even to their dense original, and sums up the drift of the rest."""
    final = {name: indices if budget.is_low_rank(name, len(indices)) else None for name, indices in kept.items()}
    drifts = {}
    for name, indices in final.items():
        delta = matrices[name].delta.double().cpu()
        drifts[name] = 0.0 if indices is None else float(delta.sum() - delta[indices].sum())
    return Selection(final, drifts)
