"""All that a matrix can be kept as: which ranks, or dense, and in how many bits.

Shapes: a matrix has r components; ranks go from 0 to r, the last being that of the dense matrix.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zssvd_lightning.selection.budget import Budget


class Options(NamedTuple):
    """Of one matrix, from the cheapest on."""

    costs: Tensor
    """float64 (O,)."""
    losses: Tensor
    """float64 (O,)."""
    ranks: Sequence[int]
    """r for the dense matrix."""
    eight_bit: Sequence[bool]

    @classmethod
    def of(cls, name: str, dropped: Tensor, rounded: Tensor | None, budget: Budget) -> "Options":
        """Those that `budget` leaves.

        Args:
            name: the matrix.
            dropped: what is lost with the components above each rank (r + 1,).
            rounded: what is lost by keeping the rest in 8 bits (r + 1,); needed where there is a choice of bits.
            budget: tells floors and costs.
        """
        found: list[tuple[int, float, int, bool]] = []
        for eight_bit in budget.bit_choices:
            lost = dropped + rounded if eight_bit and rounded is not None else dropped
            costs, full = budget.costs(name, eight_bit=eight_bit), len(dropped) - 1
            ranks = [*range(budget.floor(name), budget.highest_rank(name, eight_bit=eight_bit) + 1), full]
            found += [(costs[k], loss, k, eight_bit) for k, loss in zip(ranks, lost[ranks].tolist(), strict=True)]
        found.sort(key=lambda option: option[0])
        every_cost, every_loss, every_rank, every_choice = zip(*found, strict=True)
        return cls(
            torch.tensor(every_cost, dtype=torch.float64),
            torch.tensor(every_loss, dtype=torch.float64),
            every_rank,
            every_choice,
        )


def of_dropping(losses: Tensor) -> Tensor:
    """What is lost at each rank (r + 1,), by what each component loses that is dropped (r,)."""
    return torch.cat([losses.flip(0).cumsum(0).flip(0), losses.new_zeros(1)])


def of_rounding(losses: Tensor, dense: float) -> Tensor:
    """What is lost at each rank (r + 1,), by what each component loses that is kept (r,), and the dense matrix."""
    kept = losses.cumsum(0)
    return torch.cat([kept.new_zeros(1), kept[:-1], kept.new_tensor([dense])])
