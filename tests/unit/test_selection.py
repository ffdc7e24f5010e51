import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zssvd_lightning.budget import Budget
from zssvd_lightning.errors import BudgetError
from zssvd_lightning.selection import RULES, Components, abs_delta, zero_sum
from zssvd_lightning.storage import STORAGES, break_even_rank

GREEDY = [name for name in RULES if name != "uniform"]
shapes = st.lists(st.tuples(st.integers(3, 14), st.integers(3, 14)), min_size=1, max_size=5)


def random_matrices(shapes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        f"layer{i}": Components(
            sigma=torch.rand(min(shape), generator=g, dtype=torch.float64).sort(descending=True).values,
            delta=torch.randn(min(shape), generator=g, dtype=torch.float64) * 0.1,
        )
        for i, shape in enumerate(shapes)
    }


def random_budget(shapes, prune_ratio, fraction=0.0):
    return Budget({f"layer{i}": shape for i, shape in enumerate(shapes)}, prune_ratio, fraction)


def removed(selection, budget):
    ranks = {n: selection.rank(n) for n in budget.shapes}
    return sum(
        0 if r is None else budget.shapes[n][0] * budget.shapes[n][1] - r * sum(budget.shapes[n])
        for n, r in ranks.items()
    )


def brute_force(rule, matrices, budget):
    """The rule as one sentence: scan every offer each time, and take the best."""
    left = {n: list(range(len(m.sigma))) for n, m in matrices.items()}
    drift = 0.0

    def saved():
        return sum(
            budget.shapes[n][0] * budget.shapes[n][1] - STORAGES["factors"].cost(*budget.shapes[n], len(c))
            for n, c in left.items()
        )

    while saved() < budget.to_remove:
        offers = []
        for order, (name, components) in enumerate(left.items()):
            if len(components) <= budget.floor(name):
                continue
            delta = matrices[name].delta
            i = min(components, key=lambda c: abs(delta[c].item())) if rule == "abs_delta_unordered" else components[-1]
            d, s = delta[i].item(), matrices[name].sigma[i].item()
            offers.append((d, s, order, name, i))
        if rule == "zero_sum":
            wanted = [o for o in offers if (o[0] >= 0) == (drift <= 0)] or offers
            choice = min(wanted, key=lambda o: (abs(o[0]), o[2]))
        elif rule == "sigma":
            choice = min(offers, key=lambda o: (o[1], o[2]))
        elif rule == "most_negative":
            choice = min(offers, key=lambda o: (o[0], o[2]))
        else:
            choice = min(offers, key=lambda o: (abs(o[0]), o[2]))
        drift += choice[0]
        left[choice[3]].remove(choice[4])
    return {n: c if len(c) <= break_even_rank(*budget.shapes[n]) else None for n, c in left.items()}


@pytest.mark.parametrize("rule", GREEDY)
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("prune_ratio", "fraction"), [(0.1, 0.0), (0.4, 0.5), (0.6, 0.0)])
def test_greedy_rules_equal_brute_force(rule, seed, prune_ratio, fraction):
    g = torch.Generator().manual_seed(seed)
    shapes = [tuple(torch.randint(4, 15, (2,), generator=g).tolist()) for _ in range(4)]
    matrices, budget = random_matrices(shapes, seed), random_budget(shapes, prune_ratio, fraction)
    selection = RULES[rule](matrices, budget)
    expected = brute_force(rule, matrices, budget)
    assert {n: None if k is None else k.tolist() for n, k in selection.kept.items()} == expected


@pytest.mark.parametrize("rule", GREEDY)
@settings(max_examples=40, deadline=None)
@given(shapes=shapes, prune_ratio=st.floats(0.05, 0.6), seed=st.integers(0, 1000))
def test_budget_is_met_within_one_component(rule, shapes, prune_ratio, seed):
    try:
        budget = random_budget(shapes, prune_ratio)
    except BudgetError:
        return
    selection = RULES[rule](random_matrices(shapes, seed), budget)
    over = removed(selection, budget) - budget.to_remove
    largest = max(max(m + n, m * n - break_even_rank(m, n) * (m + n)) for m, n in shapes)
    assert 0 <= over < largest


@pytest.mark.parametrize("rule", list(RULES))
def test_module_order_does_not_matter(rule):
    shapes = [(8, 6), (12, 5), (6, 6), (9, 14)]
    matrices, budget = random_matrices(shapes), random_budget(shapes, 0.3)
    backwards = dict(reversed(matrices.items()))
    turned = Budget(dict(reversed(budget.shapes.items())), 0.3)
    one, other = RULES[rule](matrices, budget), RULES[rule](backwards, turned)
    assert {n: one.rank(n) for n in matrices} == {n: other.rank(n) for n in matrices}


@pytest.mark.parametrize("rule", ["zero_sum", "abs_delta", "most_negative", "sigma"])
def test_ties_go_to_the_earlier_module(rule):
    equal = Components(torch.ones(8), torch.zeros(8))
    shapes = {"a": (8, 8), "b": (8, 8)}
    selection = RULES[rule]({"a": equal, "b": equal}, Budget(shapes, 0.05))
    assert selection.rank("a") == 3
    assert selection.rank("b") is None


@pytest.mark.parametrize("rule", ["zero_sum", "abs_delta", "most_negative", "sigma", "uniform"])
def test_what_stays_is_a_truncation(rule):
    shapes = [(8, 6), (12, 5), (6, 6)]
    selection = RULES[rule](random_matrices(shapes), random_budget(shapes, 0.4))
    for kept in selection.kept.values():
        assert kept is None or torch.equal(kept, torch.arange(len(kept)))


def test_unordered_rule_may_leave_holes():
    delta = torch.tensor([0.0, 9.0, 0.0, 9.0, 0.0, 9.0, 0.0, 9.0])
    matrices = {"a": Components(torch.arange(8.0).flip(0), delta)}
    assert RULES["abs_delta_unordered"](matrices, Budget({"a": (8, 8)}, 0.2)).kept["a"].tolist() == [3, 5, 7]


def test_drift_of_matrices_that_return_to_dense_is_not_counted():
    matrices = {
        "thin": Components(torch.ones(8), torch.full((8,), 0.01)),
        "thick": Components(torch.ones(8), torch.tensor([9.0] * 7 + [-0.01])),
    }
    selection = zero_sum(matrices, Budget({"thin": (8, 8), "thick": (8, 8)}, 0.1))
    assert selection.rank("thick") is None
    assert selection.predicted_drift == pytest.approx(0.01 * (8 - selection.rank("thin")))


def test_running_sum_stays_within_one_component_while_both_signs_last():
    rise, fall = torch.full((40,), 0.3, dtype=torch.float64), torch.full((40,), -0.2, dtype=torch.float64)
    matrices = {"rise": Components(torch.ones(40), rise), "fall": Components(torch.ones(40), fall)}
    budget = Budget({"rise": (40, 40), "fall": (40, 40)}, 0.3)
    selection = zero_sum(matrices, budget)
    assert None not in (selection.rank("rise"), selection.rank("fall"))
    assert abs(selection.predicted_drift) <= 0.3
    assert abs(abs_delta(matrices, budget).predicted_drift) > 3


def test_uniform_ranks_are_those_of_svd_llm():
    shapes = [(8, 6), (12, 5), (6, 6), (9, 14)]
    selection = RULES["uniform"](random_matrices(shapes), random_budget(shapes, 0.4))
    assert [selection.rank(f"layer{i}") for i in range(4)] == [int(0.6 * m * n / (m + n)) for m, n in shapes]


PINNED = {
    "zero_sum": [3, 1, 1, 1, None],
    "abs_delta": [2, 1, None, 1, None],
    "abs_delta_unordered": [None, 3, 1, 1, 7],
    "most_negative": [None, 1, 1, 1, None],
    "sigma": [3, 1, 2, 5, 5],
    "uniform": [2, 2, 2, 3, 5],
}


def test_pinned_ranks():
    shapes = [(8, 6), (12, 5), (6, 6), (9, 14), (16, 16)]
    matrices = random_matrices(shapes, seed=3)
    ranks = {r: [RULES[r](matrices, random_budget(shapes, 0.3)).rank(f"layer{i}") for i in range(5)] for r in RULES}
    assert ranks == PINNED


@pytest.mark.parametrize(("prune_ratio", "fraction"), [(0.7, 0.9), (0.99, 0.0)])
def test_an_impossible_budget_is_refused_with_what_is_possible(prune_ratio, fraction):
    with pytest.raises(BudgetError, match=r"at most [\d,]+ can go"):
        random_budget([(8, 6), (6, 6)], prune_ratio, fraction)


def test_uniform_below_the_floor_is_refused_by_name():
    with pytest.raises(BudgetError, match="layer0"):
        RULES["uniform"](random_matrices([(8, 8), (30, 30)]), random_budget([(8, 8), (30, 30)], 0.85))


def test_no_matrix_falls_below_its_floor():
    shapes = [(10, 10), (14, 14)]
    matrices = random_matrices(shapes)
    matrices["layer0"] = Components(matrices["layer0"].sigma, torch.full((10,), 1e-9))
    assert abs_delta(matrices, random_budget(shapes, 0.3)).rank("layer0") == 1
    assert abs_delta(matrices, random_budget(shapes, 0.3, 0.5)).rank("layer0") == 2
