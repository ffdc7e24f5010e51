"""Choice between widths and ranks, against brute force over all combinations."""

from itertools import product

import pytest
import torch

from zssvd_lightning.errors import ConfigError
from zssvd_lightning.selection.budget import Budget
from zssvd_lightning.selection.components import Components, Narrowed, Selection
from zssvd_lightning.selection.rules import RULES, Rule
from zssvd_lightning.selection.widths.narrowings import Narrowing

SHAPES = {"gate": (8, 6), "up": (8, 6), "down": (6, 8), "other": (6, 6)}
WIDTHS = (8, 7, 6, 5, 4, 3, 2, 1)


def case(seed, scale):
    """Return components, a budget and a narrowing with losses of comparable size, convex over the widths."""
    g = torch.Generator().manual_seed(seed)
    matrices = {
        name: Components(torch.rand(6, generator=g).sort(descending=True).values, 0.1 * torch.randn(6, generator=g))
        for name in SHAPES
    }
    steps = scale * torch.rand(7, generator=g, dtype=torch.float64).sort().values
    second = torch.cat([torch.zeros(1, dtype=torch.float64), steps.cumsum(0)])
    first = torch.cat([torch.zeros(1, dtype=torch.float64), 0.1 * torch.randn(7, generator=g, dtype=torch.float64)])
    narrowing = Narrowing(("gate", "up"), "down", torch.randperm(8, generator=g)[:7], WIDTHS, first, second)
    return matrices, Budget(SHAPES, 0.35), narrowing


def losses_of(matrices, narrowing, first_order):
    dropped = {}
    for name, components in matrices.items():
        each = components.second_order + (components.delta.double() if first_order else 0)
        dropped[name] = [float(each[k:].sum()) for k in range(len(each) + 1)]
    together = narrowing.second_order + (narrowing.first_order if first_order else 0)
    return dropped, together.tolist()


def least(matrices, budget, narrowing, first_order):
    """Return the least loss over all ranks of each matrix, and over all widths with any rank of the other one."""
    dropped, together = losses_of(matrices, narrowing, first_order)
    ranks = {name: [(budget.costs(name)[k], dropped[name][k]) for k in (*budget.ranks(name), 6)] for name in SHAPES}
    best = float("inf")
    for choice in product(*ranks.values()):
        if sum(cost for cost, _ in choice) <= budget.allowed:
            best = min(best, sum(loss for _, loss in choice))
    for width, loss in zip(WIDTHS, together, strict=True):
        for cost, other in ranks["other"]:
            if width * (6 + 6 + 6) + cost <= budget.allowed:
                best = min(best, loss + other)
    return best


@pytest.mark.parametrize("rule", ["curvature", "curvature_first_order"])
@pytest.mark.parametrize("scale", [0.02, 0.3, 5.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_choice_is_the_best_of_all(seed, scale, rule):
    matrices, budget, narrowing = case(seed, scale)
    selection = RULES[rule](matrices, budget, (), [narrowing])
    first_order = rule == "curvature_first_order"
    dropped, together = losses_of(matrices, narrowing, first_order)
    loss = sum(dropped[name][6 if selection.rank(name) is None else selection.rank(name)] for name in SHAPES)
    narrower = selection.narrower(SHAPES)
    if selection.narrowed:
        place = WIDTHS.index(len(selection.narrowed["down"].units))
        loss += together[place]
        assert selection.drifts["down"] == float(narrowing.first_order[place])
        assert selection.removal_loss == float(narrowing.second_order[place])
    expected = least(matrices, budget, narrowing, first_order)
    assert loss >= expected - 1e-12
    assert loss <= expected + 0.3 * abs(expected) + 1e-12  # rows join ranks along their lower hulls alone
    ranks = {name: selection.rank(name) for name in SHAPES}
    assert budget.kept(ranks, (), narrower) <= budget.allowed
    assert bool(selection.narrowed) == (scale < 1)
    again = Selection.of_state(selection.state_dict())
    assert again.narrower(SHAPES) == narrower


def test_units_and_costs_of_a_width():
    matrices, budget, narrowing = case(0, 0.02)
    assert narrowing.costs(budget) == [18 * w for w in WIDTHS]
    assert sorted([*narrowing.units(5).tolist(), *narrowing.order[:3].tolist()]) == list(range(8))
    assert Budget(SHAPES, 0.35, unit="flops").dense_of((5, 6)) == 60
    selection = RULES["curvature"](matrices, budget, (), [narrowing])
    (producers, units) = selection.narrowed["down"]
    assert producers == ("gate", "up")
    w = len(units)
    assert selection.narrower(SHAPES) == {"gate": (w, 6), "up": (w, 6), "down": (6, w)}
    assert selection.units_of("gate", SHAPES) == (w, 8)
    assert selection.units_of("other", SHAPES) is None
    assert set(selection.of_narrowed) == {"gate", "up", "down"}


def test_a_layer_between_two_widths_is_narrower_at_one_of_them():
    shapes = {"a": (6, 6), "b": (6, 6), "c": (6, 6)}
    g = torch.Generator().manual_seed(0)
    matrices = {name: Components(1 + torch.rand(6, generator=g), torch.zeros(6)) for name in shapes}
    small = torch.arange(6, dtype=torch.float64) * 1e-3
    first = Narrowing(("a",), "b", torch.arange(5), (6, 5, 4, 3, 2, 1), small * 0, small)
    second = Narrowing(("b",), "c", torch.arange(5), (6, 5, 4, 3, 2, 1), small * 0, small / 10)
    selection = RULES["curvature"](matrices, Budget(shapes, 0.3), (), [first, second])
    assert list(selection.narrowed) == ["b"]


def test_steps_and_floors_of_widths():
    budget = Budget({"a": (1536, 576)}, 0.2, min_rank_fraction=0.3, rank_multiple=8)
    assert budget.step_of_width(1536) == 8
    assert budget.step_of_width(48) == 2
    assert budget.floor_of_width(1536) == 464  # the next multiple from 460.8
    assert Budget({"a": (1536, 576)}, 0.2).floor_of_width(1536) == 1


def test_a_rule_that_gives_a_layer_both_is_refused():
    matrices, budget, _ = case(0, 0.02)

    def both(matrices, budget):
        kept = {name: torch.arange(1) for name in matrices}
        return Selection(kept, dict.fromkeys(matrices, 0.0), narrowed={"down": Narrowed(("gate",), torch.arange(2))})

    with pytest.raises(ConfigError, match="a rank and another width"):
        Rule(both)(matrices, budget)
