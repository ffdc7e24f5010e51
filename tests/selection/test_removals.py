"""Removal of experts as an option of the knapsack."""

import itertools

import pytest
import torch

from zssvd_lightning.selection.budget import Budget
from zssvd_lightning.selection.components import Components
from zssvd_lightning.selection.removals import Removal
from zssvd_lightning.selection.rules import RULES

SHAPES = {"a.up": (6, 5), "a.down": (5, 6), "b.up": (6, 5), "b.down": (5, 6), "q": (6, 6)}


def case(seed):
    g = torch.Generator().manual_seed(seed)
    components = {
        name: Components(
            torch.rand(min(shape), generator=g, dtype=torch.float64).sort(descending=True).values,
            0.1 * torch.randn(min(shape), generator=g, dtype=torch.float64),
        )
        for name, shape in SHAPES.items()
    }
    losses = (torch.rand(2, 2, generator=g) * torch.tensor([0.2, 1.5])).tolist()
    removals = [
        Removal((f"{name}.up", f"{name}.down"), *loss, "experts", 1) for name, loss in zip("ab", losses, strict=True)
    ]
    return components, removals


def least(components, removals, budget, loss_of, loss_of_removal):
    """The least total loss over all ranks and removals of at most one expert."""
    best = torch.inf
    for gone in (None, *removals):
        names = [name for name in SHAPES if gone is None or name not in gone.layers]
        options = []
        for name in names:
            losses, full = loss_of(components[name]), min(SHAPES[name])
            options.append([(budget.costs(name)[k], float(losses[k:].sum())) for k in [*budget.ranks(name), full]])
        for chosen in itertools.product(*options):
            if sum(cost for cost, _ in chosen) <= budget.allowed:
                total = sum(loss for _, loss in chosen) + (0 if gone is None else loss_of_removal(gone))
                best = min(best, total)
    return best


@pytest.mark.parametrize("rule", ["curvature", "curvature_first_order"])
@pytest.mark.parametrize("seed", range(4))
def test_no_other_choice_is_much_better(rule, seed):
    (components, removals), first = case(seed), rule == "curvature_first_order"
    budget = Budget(SHAPES, 0.5)
    selection = RULES[rule](components, budget, removals)

    def loss_of(each):
        return each.second_order + first * each.delta

    def loss_of_removal(removal):
        return removal.second_order + first * removal.first_order

    found = sum(
        float(loss_of(components[name]).sum() - loss_of(components[name])[kept].sum())
        for name, kept in selection.kept.items()
        if kept is not None and len(kept)
    )
    gone = [removal for removal in removals if set(removal.layers) <= set(selection.removed)]
    assert len(gone) <= 1
    assert sorted(selection.removed) == sorted(name for removal in gone for name in removal.layers)
    found += sum(map(loss_of_removal, gone))
    best = least(components, removals, budget, loss_of, loss_of_removal)
    # options between those of the lower convex hull are left out
    assert best - 1e-9 <= found <= best + 0.12
    assert budget.kept({name: selection.rank(name) for name in SHAPES}) <= budget.allowed
    assert selection.first_order_sum == pytest.approx(
        sum(removal.first_order for removal in gone)
        + sum(
            float(components[name].delta.sum() - components[name].delta[kept].sum())
            for name, kept in selection.kept.items()
            if kept is not None and len(kept)
        )
    )


def test_a_removal_that_costs_nothing_is_taken_and_a_dear_one_is_not():
    components, removals = case(0)
    cheap, dear = removals[0]._replace(second_order=0.0), removals[1]._replace(second_order=100.0)
    selection = RULES["curvature"](components, Budget(SHAPES, 0.5), [cheap, dear])
    assert selection.removed == ["a.up", "a.down"]
    assert type(selection).of_state(selection.state_dict()).removed == selection.removed
