"""Ranks in proportion to a score of each matrix."""

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor


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
    weights: Sequence[float], costs: Sequence[Sequence[int]], floors: Sequence[int], allowed: int
) -> list[int]:
    """Return the ranks `clip(floor(t w), floor, full)` for the largest t that fits, plus further ranks that still fit.

    Ranks are granted one at a time, in the order in which a growing t reaches them. Ties go to the earlier matrix.

    Args:
        weights: positive weight w of each matrix.
        costs: cost of each matrix by rank, from 0 to full rank, never decreasing. The floors together must fit.
        floors: lowest rank of each matrix.
        allowed: maximum total cost.

    Example:
        >>> proportional_ranks([1.0, 2.0], [[0, 1, 2, 3], [0, 1, 2, 3]], floors=[0, 0], allowed=3)
        [1, 2]
    """
    ranks = list(floors)
    left = allowed - sum(cost[rank] for cost, rank in zip(costs, ranks, strict=True))
    coming = [((rank + 1) / weight, i) for i, (rank, weight) in enumerate(zip(ranks, weights, strict=True))]
    heapq.heapify(coming)
    while coming:
        _, i = heapq.heappop(coming)
        rank = ranks[i] + 1
        if rank < len(costs[i]) and costs[i][rank] - costs[i][rank - 1] <= left:
            left -= costs[i][rank] - costs[i][rank - 1]
            ranks[i] = rank
            heapq.heappush(coming, ((rank + 1) / weights[i], i))
    return ranks
