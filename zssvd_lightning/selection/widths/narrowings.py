"""Removal of hidden units as an option of selection, beside lower ranks of the matrices that meet in their width.

The matrices of a hidden width share one row of the knapsack. Its options are combinations of ranks of theirs, and
widths at which all of them are dense, with fewer outputs or inputs.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from zssvd_lightning.selection.budget import Budget
from zssvd_lightning.selection.components import Narrowed, Selection
from zssvd_lightning.selection.removals import Removal, Together


class Narrowing(NamedTuple):
    """Hidden width of which units may be removed."""

    producers: tuple[str, ...]
    """Names of the matrices that write it."""
    consumer: str
    """Name of the matrix that reads it."""
    order: Tensor
    """Units in the order in which they go, the first one first (g,), int64."""
    widths: tuple[int, ...]
    """Possible numbers of remaining units, descending. The first has all units."""
    first_order: Tensor
    """Predicted first-order change of the loss at each of the widths (nats), float64."""
    second_order: Tensor
    """Predicted second-order change of the loss at each of the widths (nats), float64."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of all matrices that meet in it."""
        return (*self.producers, self.consumer)

    def costs(self, budget: Budget) -> list[int]:
        """Return the cost of all matrices together at each of the widths."""
        sides = [budget.shapes[name][1] for name in self.producers] + [budget.shapes[self.consumer][0]]
        return [sum(budget.dense_of((width, side)) for side in sides) for width in self.widths]

    def units(self, width: int) -> Tensor:
        """Return the ascending numbers (w,) of the units that remain at a width."""
        h = self.widths[0]
        there = torch.ones(h, dtype=torch.bool)
        there[self.order[: h - width]] = False
        return there.nonzero().flatten()


LossesOfNarrowing = Callable[[Narrowing], Tensor]
"""Function that gives the loss at each width, in the terms in which a rule gives that of dropping components."""


def narrower_together(
    narrowings: Collection[Narrowing], budget: Budget, removals: Collection[Removal], losses_of: LossesOfNarrowing
) -> list[Together]:
    """Return the widths that the matrices of each hidden width have together.

    A matrix that meets in two widths can change its size at the first alone, and those of an expert that may be removed
    keep theirs.
    """
    found, names = list[Together](), {name for removal in removals for name in removal.layers}
    for each in narrowings:
        if names.isdisjoint(each.layers):
            found.append(Together(each.layers, each.costs(budget)[1:], losses_of(each).tolist()[1:], each.widths[1:]))
            names.update(each.layers)
    return found


def with_narrowings(selection: Selection, chosen: Mapping[str, int], narrowings: Sequence[Narrowing]) -> Selection:
    """Return a selection in which hidden widths are narrower.

    Args:
        selection: selection in which the matrices of these widths stay dense.
        chosen: number of remaining units, by the name of the matrix that reads them.
        narrowings: the possible ones.
    """
    narrowed, drifts, loss = dict[str, Narrowed](), dict(selection.drifts), selection.removal_loss
    for each in narrowings:
        width = chosen.get(each.consumer)
        if width is None or width == each.widths[0]:
            continue
        place = each.widths.index(width)
        narrowed[each.consumer] = Narrowed(each.producers, each.units(width))
        drifts[each.consumer] = float(each.first_order[place])
        loss += float(each.second_order[place])
    return replace(selection, narrowed=narrowed, drifts=drifts, removal_loss=loss)
