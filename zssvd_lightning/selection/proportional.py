"""Ranks in proportion to a score of each matrix."""

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor


def effective_rank_of(sigma: Tensor) -> float:
    """How many components carry the spectrum (r,): `exp(-sum p_i log p_i)` with `p_i = sigma_i^2 / sum_j sigma_j^2`.

    From 1, of one component, to r, of a flat spectrum (Roy and Vetterli 2007; of squares, arXiv 2509.25622).
    """
    energy = sigma.double().square()
    shares = energy / energy.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return float(torch.special.entr(shares).sum().exp())


def proportional_ranks(
    weights: Sequence[float], costs: Sequence[Sequence[int]], floors: Sequence[int], allowed: int
) -> list[int]:
    """Ranks `clip(floor(t w), floor, full)` with t as large as fits, and then as many more as fit, in the same order.

    Ranks come one at a time, in the order in which a growing t reaches them; ties go to the earlier matrix.

    Args:
        weights: w of each matrix, above 0.
        costs: of each matrix, by rank from 0 to full, never falling. The floors together must fit.
        floors: the least rank of each matrix.
        allowed: what all may cost together.
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
