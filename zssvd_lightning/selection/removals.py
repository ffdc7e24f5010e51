"""Removal of whole experts as an option of selection, beside lower ranks of their matrices.

The matrices of an expert that may be removed share one row of the knapsack. Its options are combinations of theirs, and
one of cost 0, in which all go to rank 0 together. The rows of hidden widths that may be narrower are made here too.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from zssvd_lightning.selection.candidates import Options
from zssvd_lightning.selection.components import Selection


class Removal(NamedTuple):
    """Expert that may be removed."""

    layers: tuple[str, ...]
    """Names of its matrices."""
    first_order: float
    """Predicted first-order change of the loss (nats)."""
    second_order: float
    """Predicted second-order change of the loss (nats)."""
    group: Hashable
    """Experts of which only `most` may go."""
    most: int
    """Number of experts of the group that may go."""


LossOfRemoval = Callable[[Removal], float]
"""Function that gives the loss of a removal, in the terms in which a rule gives that of dropping components."""


class Row(NamedTuple):
    """Options of one matrix, or of all matrices of an expert or a hidden width, by ascending cost."""

    names: tuple[str, ...]
    """Names of the matrices."""
    costs: Tensor
    """Cost of each option, float64 (O,)."""
    losses: Tensor
    """Predicted loss increase of each option, float64 (O,)."""
    taken: Sequence[tuple[int, ...] | int]
    """Option of each matrix in each option of the row, or what becomes of all together: the number of hidden units that
    remain, and 0 for an expert that is removed."""


class Together(NamedTuple):
    """Options that several matrices have together only."""

    names: tuple[str, ...]
    """Names of the matrices."""
    costs: Sequence[float]
    """Cost of each option."""
    losses: Sequence[float]
    """Predicted loss increase of each option."""
    sizes: Sequence[int]
    """Entry of each option in `Row.taken`."""


def removed_together(removals: Collection[Removal], loss_of: LossOfRemoval) -> list[Together]:
    """Return the option that each expert is removed: in each group, for those of least loss, as many as may go."""
    return [Together(removal.layers, [0], [loss_of(removal)], [0]) for removal in _allowed(removals, loss_of)]


def rows_of(options: Mapping[str, Options], shared: Collection[Together]) -> list[Row]:
    """Return the rows of the knapsack, in the order of their first matrices. No matrix may be in two of `shared`."""
    together = {name: each for each in shared for name in each.names}
    rows: list[Row] = []
    for name, own in options.items():
        each = together.get(name)
        if each is None:
            rows.append(Row((name,), own.costs, own.losses, [(number,) for number in range(len(own.costs))]))
        elif name == each.names[0]:
            rows.append(_joined(each, [options[member] for member in each.names]))
    return rows


def taken_of(rows: Sequence[Row], options: Sequence[int]) -> dict[str, int]:
    """Return the option of each matrix that has one of its own, given that of each row."""
    chosen = ((row.names, row.taken[option]) for row, option in zip(rows, options, strict=True))
    return {n: own for names, taken in chosen if isinstance(taken, tuple) for n, own in zip(names, taken, strict=True)}


def sizes_of(rows: Sequence[Row], options: Sequence[int]) -> dict[str, int]:
    """Return what becomes of each matrix that has an option together with others: an entry of `Row.taken`."""
    chosen = ((row.names, row.taken[option]) for row, option in zip(rows, options, strict=True))
    return {name: taken for names, taken in chosen if isinstance(taken, int) for name in names}


def with_removals(selection: Selection, removals: Collection[Removal]) -> Selection:
    """Return a selection that counts the changes of the loss by the experts whose matrices it has at rank 0."""
    removed = removed_in({name: selection.rank(name) for name in selection.kept}, removals)
    drifts = {name: removal.first_order / len(removal.layers) for name, removal in removed.items()}
    loss = sum(removal.second_order for removal in set(removed.values()))
    return replace(selection, drifts={**selection.drifts, **drifts}, removal_loss=loss)


def removed_in(ranks: Mapping[str, int | None], removals: Collection[Removal]) -> dict[str, Removal]:
    """Return the removals of which all matrices have rank 0, by the name of each matrix."""
    gone = {name for name, rank in ranks.items() if rank == 0}
    return {name: removal for removal in removals if gone.issuperset(removal.layers) for name in removal.layers}


def _allowed(removals: Collection[Removal], loss_of: LossOfRemoval) -> list[Removal]:
    groups: dict[Hashable, list[Removal]] = defaultdict(list)
    for removal in removals:
        groups[removal.group].append(removal)
    return [removal for group in groups.values() for removal in sorted(group, key=loss_of)[: group[0].most]]


def _joined(together: Together, parts: Sequence[Options]) -> Row:
    """Return what the matrices have together only, and the combinations of their options that are best at some price.

    These are the sums of the lower convex hulls of loss over cost: from the cheapest options, the change that lowers
    the loss most per unit of cost comes first.
    """
    hulls = [_hull(part) for part in parts]
    places = [0] * len(parts)
    taken: list[tuple[int, ...]] = [tuple(hull[0] for hull in hulls)]
    while any(place + 1 < len(hull) for place, hull in zip(places, hulls, strict=True)):
        slopes = [
            _slope(part, hull[place], hull[place + 1]) if place + 1 < len(hull) else 0.0
            for part, hull, place in zip(parts, hulls, places, strict=True)
        ]
        places[min(range(len(parts)), key=slopes.__getitem__)] += 1
        taken.append(tuple(hull[place] for hull, place in zip(hulls, places, strict=True)))

    def total(every: Sequence[Tensor]) -> Tensor:
        picked = [values[[option[part] for option in taken]] for part, values in enumerate(every)]
        return torch.stack(picked).sum(0)

    costs, losses = total([part.costs for part in parts]), total([part.losses for part in parts])
    costs = torch.cat([costs.new_tensor(together.costs), costs])
    losses = torch.cat([losses.new_tensor(together.losses), losses])
    costs, order = costs.sort(stable=True)
    every = [*together.sizes, *taken]
    return Row(together.names, costs, losses[order], [every[place] for place in order.tolist()])


def _slope(part: Options, low: int, high: int) -> float:
    """Return the change of the loss per unit of cost between two options."""
    return float((part.losses[high] - part.losses[low]) / (part.costs[high] - part.costs[low]))


def _hull(part: Options) -> list[int]:
    """Return the options on the lower convex hull of loss over cost, from the cheapest to that of least loss."""
    hull: list[int] = []
    for option, (cost, loss) in enumerate(zip(part.costs.tolist(), part.losses.tolist(), strict=True)):
        if hull and loss >= part.losses[hull[-1]]:
            continue
        if hull and cost == part.costs[hull[-1]]:
            hull.pop()
        while len(hull) > 1 and _slope(part, hull[-2], hull[-1]) >= _slope(part, hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull
