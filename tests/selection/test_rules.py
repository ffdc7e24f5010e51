import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zssvd_lightning.errors import BudgetError, CalibrationError, ConfigError
from zssvd_lightning.layers.storage import UNITS, break_even_rank
from zssvd_lightning.selection.budget import Budget
from zssvd_lightning.selection.components import Components
from zssvd_lightning.selection.rules import RULES, abs_delta, curvature, effective_rank, zero_sum
from zssvd_lightning.selection.storages import STORAGES

GREEDY = ["zero_sum", "zero_sum_curvature", "abs_delta", "abs_delta_unordered", "most_negative", "sigma"]
CHOOSE_BITS = RULES.those(lambda rule: rule.chooses_bits)
ONE_FORM = [name for name in RULES if name not in CHOOSE_BITS]
shapes = st.lists(st.tuples(st.integers(3, 14), st.integers(3, 14)), min_size=1, max_size=5)


def random_matrices(shapes, seed=0):
    g, rounding = (torch.Generator().manual_seed(s) for s in (seed, seed + 1))
    return {
        f"layer{i}": Components(
            sigma=torch.rand(min(shape), generator=g, dtype=torch.float64).sort(descending=True).values,
            delta=torch.randn(min(shape), generator=g, dtype=torch.float64) * 0.1,
            rounding=torch.rand(min(shape), generator=rounding, dtype=torch.float64) * 0.05,
            rounding_dense=0.03 * min(shape),
        )
        for i, shape in enumerate(shapes)
    }


def random_budget(shapes, prune_ratio, fraction=0.0, **settings):
    return Budget({f"layer{i}": shape for i, shape in enumerate(shapes)}, prune_ratio, fraction, **settings)


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
        return sum(budget.dense(n) - budget.costs(n)[len(c)] for n, c in left.items())

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
        elif rule == "zero_sum_curvature":
            wanted = [o for o in offers if (o[0] >= 0) == (drift <= 0)] or offers
            choice = min(wanted, key=lambda o: (o[1] ** 2 / sum(budget.shapes[o[3]]), o[2]))
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


@pytest.mark.parametrize("rule", ["zero_sum", "zero_sum_curvature", "abs_delta", "most_negative", "sigma"])
def test_ties_go_to_the_earlier_module(rule):
    equal = Components(torch.ones(8), torch.zeros(8))
    shapes = {"a": (8, 8), "b": (8, 8)}
    selection = RULES[rule]({"a": equal, "b": equal}, Budget(shapes, 0.05))
    assert selection.rank("a") == 3
    assert selection.rank("b") is None


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "abs_delta_unordered"])
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
    assert selection.first_order_sum == pytest.approx(0.01 * (8 - selection.rank("thin")))


def test_running_sum_stays_within_one_component_while_both_signs_last():
    rise, fall = torch.full((40,), 0.3, dtype=torch.float64), torch.full((40,), -0.2, dtype=torch.float64)
    matrices = {"rise": Components(torch.ones(40), rise), "fall": Components(torch.ones(40), fall)}
    budget = Budget({"rise": (40, 40), "fall": (40, 40)}, 0.3)
    selection = zero_sum(matrices, budget)
    assert None not in (selection.rank("rise"), selection.rank("fall"))
    assert abs(selection.first_order_sum) <= 0.3
    assert abs(abs_delta(matrices, budget).first_order_sum) > 3


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
    "zero_sum_curvature": [3, 2, None, 4, 5],
    "effective_rank": [None, None, None, 4, 4],
    "curvature": [3, 2, None, None, 4],
    "curvature_first_order": [None, 1, None, 3, 6],
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


def largest_step(budget):
    """The most that one component more or less changes what is kept."""
    return max(after - before for name in budget.shapes for before, after in itertools.pairwise(budget.costs(name)))


@pytest.mark.parametrize("rule", ONE_FORM)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("storage", ["factors", "pivoted", "remap", "hq", "mixed"])
def test_every_rule_meets_the_budget_of_every_storage_and_unit(rule, storage, unit):
    shapes = [(18, 16), (22, 9), (12, 12), (9, 24)]
    budget = random_budget(shapes, 0.55, 0.0 if rule == "uniform" else 0.1, storage=storage, unit=unit)
    if storage == "mixed":
        with pytest.raises(
            ConfigError, match=f"'{rule}' cannot choose .* storage 'mixed' .* use selection curvature or"
        ):
            RULES[rule](random_matrices(shapes), budget)
        return
    selection = RULES[rule](random_matrices(shapes), budget)
    ranks = {name: selection.rank(name) for name in budget.shapes}
    over = budget.allowed - budget.kept(ranks)
    assert 0 <= over < largest_step(budget) * (len(shapes) if rule == "uniform" else 1)
    assert selection.eight_bit == frozenset()
    assert all(rank is None or budget.floor(n) <= rank <= budget.highest_rank(n) for n, rank in ranks.items())


def loss_of(rule, components, rank, *, eight_bit):
    """What a matrix loses, by the sentence that says it."""
    loss = sum(s**2 / 2 for s in components.sigma.tolist()[rank:])
    if rule == "curvature_first_order":
        loss += sum(components.delta.tolist()[rank:])
    if eight_bit:
        dense = rank == len(components.sigma)
        loss += components.rounding_dense if dense else sum(components.rounding.tolist()[:rank])
    return loss


def every_choice(rule, matrices, budget):
    """(cost, loss) of every way to keep all matrices."""
    ways = []
    for name, components in matrices.items():
        full, found = len(components.sigma), []
        for eight_bit in [False, True] if budget.storage == "mixed" else [False]:
            for rank in [*range(budget.floor(name), full), full]:
                if rank < full and not budget.is_low_rank(name, rank, eight_bit=eight_bit):
                    continue
                cost = budget.kept_of(name, None if rank == full else rank, eight_bit=eight_bit)
                found.append((cost, loss_of(rule, components, rank, eight_bit=eight_bit)))
        ways.append(found)
    return [tuple(map(sum, zip(*choice, strict=True))) for choice in itertools.product(*ways)]


def outcome(rule, matrices, budget):
    """Cost and loss of what a rule chooses."""
    selection = RULES[rule](matrices, budget)
    ranks = {name: selection.rank(name) for name in matrices}
    loss = 0.0
    for name, rank in ranks.items():
        components = matrices[name]
        rank = len(components.sigma) if rank is None else rank  # noqa: PLW2901
        loss += loss_of(
            "curvature" if rule in GREEDY else rule, components, rank, eight_bit=name in selection.eight_bit
        )
    return budget.kept(ranks, selection.eight_bit), loss


def led_to_by_a_price(points):
    """Those of least `loss + price cost` for some price, found by trying all that could matter."""
    best = {}
    for cost, loss in points:
        best[cost] = min(loss, best.get(cost, float("inf")))
    found, corner = [], min(best.items())
    while True:
        found.append(corner)
        slopes = [((corner[1] - loss) / (cost - corner[0]), cost) for cost, loss in best.items() if cost > corner[0]]
        if not slopes or max(slopes)[0] <= 0:
            return found
        corner = (max(slopes)[1], best[max(slopes)[1]])


@pytest.mark.parametrize("rule", CHOOSE_BITS)
@pytest.mark.parametrize("fraction", [0.0, 0.6])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("storage", STORAGES)
def test_curvature_is_the_best_there_is_at_each_budget_that_a_price_leads_to(storage, unit, fraction, rule):
    shapes = [(7, 6), (9, 5), (6, 8)]
    matrices = random_matrices(shapes, seed=len(storage + unit))
    whole = random_budget(shapes, 0.9, fraction, storage=storage, unit=unit, planned=True)
    reached = 0
    for cost, loss in led_to_by_a_price(every_choice(rule, matrices, whole)):
        try:
            budget = random_budget(shapes, 1 - cost / whole.total, fraction, storage=storage, unit=unit)
        except BudgetError:  # of 8 bits alone
            continue
        assert budget.allowed == cost
        assert outcome(rule, matrices, budget) == (cost, pytest.approx(loss))
        reached += 1
    assert reached > 1


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("seed", range(10))
def test_curvature_of_a_few_matrices_is_the_best_there_is_at_any_budget(storage, seed):
    shapes = [(12, 10), (16, 8), (9, 14)]
    matrices = random_matrices(shapes, seed)
    budget = random_budget(shapes, 0.45 + 0.015 * seed, storage=storage, unit="bytes")
    cost, loss = outcome("curvature", matrices, budget)
    assert cost <= budget.allowed
    best = min(x for c, x in every_choice("curvature", matrices, budget) if c <= budget.allowed)
    assert loss == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("storage", ["factors", "pivoted", "remap", "hq"])
@pytest.mark.parametrize("seed", range(10))
def test_curvature_is_not_worse_than_a_greedy_rule(storage, seed):
    g = torch.Generator().manual_seed(seed)
    shapes = [tuple(torch.randint(12, 40, (2,), generator=g).tolist()) for _ in range(6)]
    matrices, budget = random_matrices(shapes, seed), random_budget(shapes, 0.65, storage=storage)
    _, least = outcome("curvature", matrices, budget)
    assert all(least <= outcome(rule, matrices, budget)[1] * (1 + 1e-6) for rule in [*GREEDY, "effective_rank"])


def test_first_order_gives_up_more_than_asked_where_that_lowers_the_loss():
    matrices = {"a": Components(torch.full((8,), 0.1), torch.full((8,), -1.0))}
    budget = Budget({"a": (8, 8)}, 0.1)
    assert RULES["curvature_first_order"](matrices, budget).rank("a") == 1
    assert RULES["curvature"](matrices, budget).rank("a") == 3


def test_bits_go_where_rounding_costs_least():
    spectrum = torch.linspace(2, 1, 16)
    matrices = {
        "tender": Components(spectrum, torch.zeros(16), torch.full((16,), 9.0), 99.0),
        "hardy": Components(spectrum, torch.zeros(16), torch.full((16,), 1e-6), 1e-6),
    }
    budget = Budget(dict.fromkeys(matrices, (16, 16)), 0.2, storage="mixed", unit="bytes")
    selection = curvature(matrices, budget)
    assert selection.eight_bit == {"hardy"}
    assert selection.kept == {"tender": None, "hardy": None}
    ranks = {name: selection.rank(name) for name in matrices}
    assert budget.kept(ranks, selection.eight_bit) == 2 * 256 + 256 + 2 * 16


def test_bits_are_not_chosen_without_predictions():
    matrices = {"net.q": Components(torch.ones(8), torch.zeros(8))}
    with pytest.raises(CalibrationError, match=r"net\.q has no prediction"):
        curvature(matrices, Budget({"net.q": (8, 8)}, 0.3, storage="mixed"))


def test_equal_spectra_get_ranks_by_their_shapes():
    shapes = {"square": (40, 40), "wide": (40, 120)}
    matrices = {name: Components(torch.linspace(2, 1, 40), torch.zeros(40)) for name in shapes}
    selection = effective_rank(matrices, Budget(shapes, 0.5))
    assert selection.rank("square") / selection.rank("wide") == pytest.approx((160 / 80) ** 0.5, rel=0.1)


def test_a_flatter_spectrum_gets_a_higher_rank():
    shapes = {"flat": (80, 80), "steep": (80, 80)}
    matrices = {
        "flat": Components(torch.ones(80), torch.zeros(80)),
        "steep": Components(torch.cat([torch.ones(20), torch.zeros(60)]), torch.zeros(80)),
    }
    selection = effective_rank(matrices, Budget(shapes, 0.7))
    assert selection.rank("flat") / selection.rank("steep") == pytest.approx(2, rel=0.05)


def test_equal_matrices_get_ranks_as_equal_as_fits():
    shapes = dict.fromkeys("abcd", (30, 20))
    matrices = {name: Components(torch.linspace(2, 1, 20), torch.zeros(20)) for name in shapes}
    budget = Budget(shapes, 0.43)
    ranks = [effective_rank(matrices, budget).rank(name) for name in "abcd"]
    assert ranks == [7, 7, 7, 6]
    assert sum(ranks) == budget.allowed // 50


def test_what_a_component_weighs_against_is_its_cost():
    spectrum = torch.linspace(1, 0.1, 12)
    matrices = {name: Components(spectrum, torch.zeros(12)) for name in ("thin", "thick")}
    budget = Budget({"thin": (12, 12), "thick": (12, 100)}, 0.85)
    selection = RULES["zero_sum_curvature"](matrices, budget)
    assert selection.rank("thick") < selection.rank("thin")
    assert RULES["zero_sum"](matrices, budget).rank("thin") < selection.rank("thin")
