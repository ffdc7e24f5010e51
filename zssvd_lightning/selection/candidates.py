"""Options for storing a matrix: at which rank, or dense, and in how many bits.

Shapes: a matrix has r components. Ranks run from 0 to r, where r stands for the matrix as it is: dense, or low-rank
from an earlier compression.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zssvd_lightning.errors import CalibrationError
from zssvd_lightning.selection.budget import Budget
from zssvd_lightning.selection.components import Components


class Options(NamedTuple):
    """Options of one matrix, by ascending cost."""

    costs: Tensor
    """Cost of each option, float64 (O,)."""
    losses: Tensor
    """Predicted loss increase of each option, float64 (O,)."""
    ranks: Sequence[int]
    """Rank of each option; r for the matrix as it is."""
    eight_bit: Sequence[bool]
    """True for each option in 8 bits."""

    @classmethod
    def of(cls, name: str, dropped: Tensor, rounded: Tensor | None, budget: Budget) -> "Options":
        """Build the options that `budget` allows.

        Args:
            name: name of the matrix.
            dropped: loss increase (r + 1,) from dropping the components above each rank.
            rounded: loss increase (r + 1,) from storing the remaining components in 8 bits. Needed if selection chooses
                the bits.
            budget: source of floors and costs.
        """
        found: list[tuple[int, float, int, bool]] = []
        for eight_bit in budget.bit_choices:
            lost = dropped + rounded if eight_bit and rounded is not None else dropped
            costs, full = budget.costs(name, eight_bit=eight_bit), len(dropped) - 1
            ranks = [*budget.ranks(name, eight_bit=eight_bit)]
            ranks += [] if eight_bit and name in budget.present else [full]  # what is low-rank stays in 16 bits
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
    """Return the loss increase from dropping at each rank (r + 1,), given that of each dropped component (r,)."""
    return torch.cat([losses.flip(0).cumsum(0).flip(0), losses.new_zeros(1)])


def of_rounding(losses: Tensor, dense: float) -> Tensor:
    """Return the loss increase from rounding at each rank (r + 1,).

    Args:
        losses: loss increase (r,) from storing each component in 8 bits.
        dense: loss increase from storing the dense matrix in 8 bits.
    """
    kept = losses.cumsum(0)
    return torch.cat([kept.new_zeros(1), kept[:-1], kept.new_tensor([dense])])


def rounding_losses(name: str, components: Components) -> Tensor:
    """Return the loss increase (r + 1,) from storing a matrix in 8 bits, by rank.

    Raises:
        CalibrationError: the components have no prediction of it.
    """
    if components.rounding is None or components.rounding_dense is None:
        raise CalibrationError(f"{name} has no prediction of what 8 bits would lose; choose a storage of one form")
    return of_rounding(components.rounding.double().cpu(), components.rounding_dense)
