"""Ranks in proportion to a score of each matrix."""

import heapq
from bisect import bisect_right
from collections.abc import Sequence

import torch
from torch import Tensor

from zssvd_lightning.errors import BudgetError
from zssvd_lightning.selection.budget import Budget


def effective_rank_of(sigma: Tensor) -> float:
    """Return the effective rank of a spectrum (r,): `exp(-sum p_i log p_i)` with `p_i = sigma_i^2 / sum_j sigma_j^2`.

    It ranges from 1 for a single nonzero component to r for a flat spectrum (Roy and Vetterli 2007; with squared
    singular values, arXiv 2509.25622).

    Example:
        >>> round(effective_rank_of(torch.tensor([2.0, 2.0, 0.0])), 6)
        2.0
    """
    energy = sigma.double().square()
    shares = energy / energy.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return float(torch.special.entr(shares).sum().exp())


def proportional_ranks(
    weights: Sequence[float], costs: Sequence[Sequence[int]], stops: Sequence[Sequence[int]], allowed: int
) -> list[int]:
    """Return the ranks `clip(floor(t w), floor, full)` for the largest t that fits, plus further ranks that still fit.

    Ranks are granted one step at a time, in the order in which a growing t reaches them. Ties go to the earlier matrix.
    A step of several components comes when t reaches their mean, so that `t w` is rounded to about the nearest step.

    Args:
        weights: positive weight w of each matrix.
        costs: cost of each matrix by rank, from 0 to full rank, never decreasing. The lowest stops together must fit.
        stops: possible ranks of each matrix, ascending from its floor.
        allowed: maximum total cost.

    Example:
        >>> proportional_ranks([1.0, 2.0], [[0, 1, 2, 3], [0, 1, 2, 3]], stops=[range(4), range(4)], allowed=3)
        [1, 2]
        >>> proportional_ranks([1.0, 2.0], [[0, 1, 2, 3], [0, 1, 2, 3]], stops=[[0, 2], [1, 3]], allowed=4)
        [0, 3]
    """
    at = [0] * len(stops)
    left = allowed - sum(cost[stop[0]] for cost, stop in zip(costs, stops, strict=True))
    coming: list[tuple[float, int]] = []

    def offer(i: int) -> None:
        if at[i] + 1 < len(stops[i]):
            rank, higher = stops[i][at[i] : at[i] + 2]
            heapq.heappush(coming, ((rank + 1 + higher) / 2 / weights[i], i))

    for i in range(len(stops)):
        offer(i)
    while coming:
        _, i = heapq.heappop(coming)
        rank, higher = stops[i][at[i] : at[i] + 2]
        if costs[i][higher] - costs[i][rank] <= left:
            left -= costs[i][higher] - costs[i][rank]
            at[i] += 1
            offer(i)
    return [stop[i] for stop, i in zip(stops, at, strict=True)]


def uniform_ranks(budget: Budget) -> dict[str, int]:
    """Return the ranks of `uniform`: each matrix costs about its share, and all together at most `1 - prune_ratio`.

    Raises:
        BudgetError: a rank is below the floor of its matrix.
    """
    ranks, missing = {}, {}
    for name, (m, n) in budget.shapes.items():
        share, costs = (1 - budget.prune_ratio) * budget.reference(name), budget.costs(name)
        ranks[name] = bisect_right(costs, share + 1e-9) - 1
        if ranks[name] < budget.floor(name):
            raise BudgetError(
                f"uniform ranks give {name} ({m}, {n}) rank {ranks[name]}, below its floor {budget.floor(name)}; "
                "lower min_rank_fraction, rank_multiple or prune_ratio, or use a global selection"
            )
        if budget.step(name) > 1:
            missing[name] = (share - costs[ranks[name]]) / budget.reference(name)
    left = budget.allowed - sum(budget.costs(name)[rank] for name, rank in ranks.items())
    for name in sorted(missing, key=lambda name: -missing[name]):
        costs, higher = budget.costs(name), next((k for k in budget.stops(name) if k > ranks[name]), ranks[name])
        if costs[higher] - costs[ranks[name]] <= left:
            left -= costs[higher] - costs[ranks[name]]
            ranks[name] = higher
    return ranks
