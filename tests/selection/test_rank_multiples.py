"""Ranks in multiples: a constraint that every rule keeps."""

import itertools
import re
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rules import GREEDY, loss_of, outcome, random_budget, random_matrices

from zssvd_lightning.errors import BudgetError, ConfigError
from zssvd_lightning.layers.storage import UNITS, Present, factors
from zssvd_lightning.selection.budget import Budget
from zssvd_lightning.selection.candidates import Options, of_dropping
from zssvd_lightning.selection.components import Components, Selection
from zssvd_lightning.selection.plan import Plan
from zssvd_lightning.selection.rules import RULES, Rule, of_ranks
from zssvd_lightning.selection.storages import STORAGES

CHOOSE_BITS = RULES.those(lambda rule: rule.chooses_bits)
WIDE = [(70, 64), (40, 33), (90, 20), (34, 66)]
"""With multiple 8: steps of 4, 2, 1 and 2."""


def stays(budget, name, *, eight_bit=False):
    return budget.kept_of(name, None, eight_bit=eight_bit)


def allowed_ranks(budget, name, step, *, eight_bit=False):
    """By trying all ranks below the full one."""
    ranks = range(step, min(budget.shapes[name]), step)
    return [k for k in ranks if budget.kept_of(name, k, eight_bit=eight_bit) < stays(budget, name, eight_bit=eight_bit)]


@pytest.mark.parametrize(
    ("multiple", "small", "step"),
    [
        *((8, 31, 1), (8, 32, 2), (8, 63, 2), (8, 64, 4), (8, 127, 4), (8, 128, 8), (8, 4096, 8)),
        *((1, 31, 1), (1, 4096, 1), (64, 1023, 32), (64, 1024, 64), (32, 576, 32), (64, 576, 32), (16, 192, 8)),
        *((24, 383, 16), (24, 384, 24), (3, 47, 2), (3, 48, 3)),
    ],
)
def test_small_matrices_have_finer_steps(multiple, small, step):
    for shape in ((small, small), (small, 5000), (5000, small)):
        assert Budget({"a": shape}, 0.4, rank_multiple=multiple).step("a") == step


sizes = st.integers(1, 300)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("storage", STORAGES)
@settings(max_examples=10, deadline=None)
@given(m=sizes, n=sizes, multiple=st.integers(1, 20), fraction=st.sampled_from([0.0, 0.3, 0.61, 1.0]))
def test_allowed_ranks_are_the_multiples_that_save(storage, unit, m, n, multiple, fraction):
    budget = Budget({"a": (m, n)}, 0.5, fraction, storage, planned=True, unit=unit, rank_multiple=multiple)
    step = budget.step("a")
    assert step == multiple or (step < multiple and step.bit_count() == 1 and (step == 1 or 16 * step <= min(m, n)))
    saving, every = allowed_ranks(budget, "a", step), allowed_ranks(budget, "a", 1)
    assert budget.highest_rank("a") == max(saving, default=0)
    floor = min(max(saving, default=0), max(1, fraction * max(every, default=0)))
    assert list(budget.ranks("a")) == [k for k in saving if k >= floor - 1e-9]
    assert bool(saving) == bool(every)
    assert budget.floor("a") == min(budget.ranks("a"), default=1)
    costs = budget.costs("a")
    assert budget.kept_of("a", 0) == budget.rounded_up("a", 0) == 0  # which stands for a removal
    for k in range(1, min(m, n) + 1):
        raised = next((rank for rank in saving if rank >= k), None)
        assert costs[k] == budget.kept_of("a", raised)
        assert budget.rounded_up("a", k) == (k if raised is None else raised)
    above = range(max(budget.ranks("a"), default=0) + 1, min(m, n) + 1)
    assert budget.stops("a") == (*budget.ranks("a"), *above)


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_a_multiple_of_1_allows_every_rank(storage):
    free = Budget({"a": (200, 150)}, 0.4, 0.3, storage)
    one = replace(free, rank_multiple=1)
    assert one == free
    assert list(one.ranks("a")) == list(range(free.floor("a"), free.highest_rank("a") + 1))
    assert one.costs("a") == STORAGES[storage].costs(200, 150)
    assert one.stops("a") == tuple(range(free.floor("a"), 151))


def test_an_impossible_budget_names_the_multiple_where_there_is_one():
    with pytest.raises(BudgetError, match=r"min_rank_fraction 0\.0 and rank_multiple 8 at most [\d,]+ can go"):
        Budget({"a": (128, 128)}, 0.9, rank_multiple=8)
    assert Budget({"a": (128, 128)}, 0.9).floor("a") == 1
    with pytest.raises(BudgetError, match=r"min_rank_fraction 0\.0 at most"):
        Budget({"a": (16, 16)}, 0.95, rank_multiple=8)


def largest_step(budget):
    """The most that one step more or less changes what is kept."""
    stops = {name: budget.stops(name) for name in budget.shapes}
    return max(
        budget.costs(name)[b] - budget.costs(name)[a] for name in stops for a, b in itertools.pairwise(stops[name])
    )


def assert_allowed(selection, budget):
    """Every rank is a multiple that saves, and not below its floor."""
    for name in budget.shapes:
        rank, eight_bit = selection.rank(name), name in selection.eight_bit
        possible = allowed_ranks(budget, name, budget.step(name), eight_bit=eight_bit)
        assert rank is None or (rank in possible and rank >= budget.floor(name))


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=10, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(3, 70), st.integers(3, 70)), min_size=1, max_size=4),
    multiple=st.sampled_from([1, 2, 3, 4, 8]),
    prune_ratio=st.floats(0.05, 0.8),
    fraction=st.sampled_from([0.0, 0.2]),
    storage=st.sampled_from(["factors", "pivoted", "remap", "hq", "mixed"]),
    unit=st.sampled_from(list(UNITS)),
    seed=st.integers(0, 1000),
)
def test_every_rule_meets_the_budget_with_allowed_ranks(
    rule, shapes, multiple, prune_ratio, fraction, storage, unit, seed
):
    if storage == "mixed" and rule not in CHOOSE_BITS:
        return
    try:
        budget = random_budget(shapes, prune_ratio, fraction, storage=storage, unit=unit, rank_multiple=multiple)
        selection = RULES[rule](random_matrices(shapes, seed), budget)
    except BudgetError:
        return
    assert_allowed(selection, budget)
    over = budget.allowed - budget.kept({n: selection.rank(n) for n in budget.shapes}, selection.eight_bit)
    assert over >= 0
    if rule not in CHOOSE_BITS and not (rule == "uniform" and any(budget.step(name) == 1 for name in budget.shapes)):
        assert over < largest_step(budget)


def brute_force(rule, matrices, budget):
    """The rule as one sentence: scan the next step of every matrix each time, and take the best."""
    left = {n: list(range(len(m.sigma))) for n, m in matrices.items()}
    allowed = {name: allowed_ranks(budget, name, budget.step(name)) for name in matrices}
    drift = 0.0

    def kept():
        return sum(budget.kept_of(n, len(c)) if len(c) in allowed[n] else stays(budget, n) for n, c in left.items())

    while kept() > budget.allowed:
        offers = []
        for order, (name, components) in enumerate(left.items()):
            ranks = [k for k in allowed[name] if k >= budget.floor(name)]
            full = len(components)
            lower = max((k for k in ranks if k < full), default=None) if full <= max(ranks) + 1 else full - 1
            if lower is None:
                continue
            delta, sigma = matrices[name].delta, matrices[name].sigma
            ordered = components
            if rule == "abs_delta_unordered":
                ordered = sorted(components, key=lambda c: (abs(delta[c].item()), c), reverse=True)
            step, cost = ordered[lower:], sum(budget.shapes[name])
            mean = {
                "zero_sum": lambda c, delta=delta: abs(delta[c].item()),
                "zero_sum_curvature": lambda c, sigma=sigma, cost=cost: sigma[c].item() ** 2 / 2 / cost,
                "sigma": lambda c, sigma=sigma: sigma[c].item(),
                "most_negative": lambda c, delta=delta: delta[c].item(),
            }.get(rule, lambda c, delta=delta: abs(delta[c].item()))
            key = sum(map(mean, step)) / len(step)
            offers.append((key, order, sum(delta[c].item() for c in step), name, step))
        if rule.startswith("zero_sum"):
            offers = [o for o in offers if (o[2] >= 0) == (drift <= 0)] or offers
        choice = min(offers)
        drift += choice[2]
        left[choice[3]] = [c for c in left[choice[3]] if c not in choice[4]]
    return {n: c if len(c) in allowed[n] else None for n, c in left.items()}


@pytest.mark.parametrize("rule", GREEDY)
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("prune_ratio", "fraction"), [(0.1, 0.0), (0.4, 0.5), (0.6, 0.0)])
def test_greedy_rules_equal_brute_force_in_steps(rule, seed, prune_ratio, fraction):
    matrices = random_matrices(WIDE, seed)
    budget = random_budget(WIDE, prune_ratio, fraction, rank_multiple=8)
    assert sorted(map(budget.step, budget.shapes)) == [1, 2, 2, 4]
    selection = RULES[rule](matrices, budget)
    expected = brute_force(rule, matrices, budget)
    assert {n: None if k is None else k.tolist() for n, k in selection.kept.items()} == expected


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), prune_ratio=st.floats(0.1, 0.7), storage=st.sampled_from(["factors", "pivoted"]))
def test_no_exchange_of_two_steps_lowers_the_sum_of_singular_values(seed, prune_ratio, storage):
    matrices = random_matrices(WIDE, seed)
    budget = random_budget(WIDE, prune_ratio, storage=storage, rank_multiple=8)
    selection = RULES["sigma"](matrices, budget)
    gone, next_gone = [], []
    for name, kept in selection.kept.items():
        if kept is not None:
            sigma, ranks, rank = matrices[name].sigma, budget.ranks(name), len(kept)
            next_gone += [sigma[k:rank].mean().item() for k in ranks if k == rank - ranks.step]
            gone += [sigma[k : k + ranks.step].mean().item() for k in ranks if rank <= k < ranks[-1]]
    assert max(gone, default=0.0) <= min(next_gone, default=9.0) + 1e-12


def test_the_running_sum_stays_within_one_step_while_both_signs_last():
    rise, fall = torch.full((64,), 0.3, dtype=torch.float64), torch.full((64,), -0.2, dtype=torch.float64)
    matrices = {"rise": Components(torch.ones(64), rise), "fall": Components(torch.ones(64), fall)}
    budget = Budget(dict.fromkeys(matrices, (64, 64)), 0.3, storage="pivoted", rank_multiple=8)
    selection = RULES["zero_sum"](matrices, budget)
    assert None not in (selection.rank("rise"), selection.rank("fall"))
    assert abs(selection.first_order_sum) <= 4 * 0.3


def best_by_brute_force(rule, matrices, budget):
    """Least loss over all combinations of allowed ranks, matrices as they are, and bits."""
    ways = []
    for name, components in matrices.items():
        full, found = len(components.sigma), []
        for eight_bit in budget.bit_choices:
            for rank in [*allowed_ranks(budget, name, budget.step(name), eight_bit=eight_bit), full]:
                if rank >= budget.floor(name):
                    cost = budget.kept_of(name, None if rank == full else rank, eight_bit=eight_bit)
                    found.append((cost, loss_of(rule, components, rank, eight_bit=eight_bit)))
        ways.append(found)
    choices = (tuple(map(sum, zip(*choice, strict=True))) for choice in itertools.product(*ways))
    return min(loss for cost, loss in choices if cost <= budget.allowed)


@pytest.mark.parametrize("rule", CHOOSE_BITS)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("seed", range(2))
def test_least_loss_is_that_of_all_allowed_ranks(seed, storage, rule):
    shapes = [(34, 33), (32, 40), (24, 20)]
    matrices = random_matrices(shapes, seed)
    ratio, fraction = 0.55 + 0.05 * seed, 0.2 * (seed == 1)
    budget = random_budget(shapes, ratio, fraction, storage=storage, unit="bytes", rank_multiple=4)
    assert sorted(map(budget.step, budget.shapes)) == [1, 2, 2]
    cost, loss = outcome(rule, matrices, budget)
    assert cost <= budget.allowed
    assert loss == pytest.approx(best_by_brute_force(rule, matrices, budget), rel=1e-6)


def test_uniform_takes_the_nearest_multiples_that_fit():
    shapes = {str(i): shape for i, shape in enumerate([(130, 128), (400, 160), (128, 512), (256, 256), (131, 700)])}
    matrices = {name: Components(torch.ones(min(s)), torch.zeros(min(s))) for name, s in shapes.items()}
    free, budget = Budget(shapes, 0.37), Budget(shapes, 0.37, rank_multiple=8)
    exact = {name: (1 - 0.37) * m * n / (m + n) for name, (m, n) in shapes.items()}
    ranks = {name: RULES["uniform"](matrices, budget).rank(name) for name in shapes}
    raised = [name for name in shapes if ranks[name] > exact[name]]
    assert all(abs(ranks[name] - exact[name]) < 8 for name in shapes)
    assert 0 < len(raised) < len(shapes)
    left = budget.allowed - budget.kept(ranks)
    assert all(left < 8 * sum(shapes[name]) for name in shapes if name not in raised)
    assert {n: RULES["uniform"](matrices, free).rank(n) for n in shapes} == {n: int(k) for n, k in exact.items()}


def test_effective_ranks_of_equal_matrices_differ_by_one_step_at_most():
    shapes = dict.fromkeys("abcde", (300, 200))
    matrices = {name: Components(torch.linspace(2, 1, 200), torch.zeros(200)) for name in shapes}
    budget = Budget(shapes, 0.43, rank_multiple=8)
    ranks = [RULES["effective_rank"](matrices, budget).rank(name) for name in shapes]
    assert ranks == [72, 72, 64, 64, 64]
    assert budget.allowed - sum(ranks) * 500 < 8 * 500


def test_ranks_of_a_registered_rule_are_raised_as_costs_count_them(monkeypatch):
    budget = Budget({"a": (128, 128), "b": (128, 300)}, 0.4, rank_multiple=8)
    matrices = {name: Components(torch.linspace(2, 1, 128), torch.zeros(128)) for name in budget.shapes}
    selection = of_ranks(matrices, budget, {"a": 33, "b": 48})
    assert (selection.rank("a"), selection.rank("b")) == (40, 48)
    assert budget.costs("a")[33] == budget.kept_of("a", 40)
    assert of_ranks(matrices, budget, {"a": 57, "b": 48}).rank("a") is None  # 64 saves nothing
    source = Path(__file__).parents[2] / "docs" / "extending" / "rule.py"
    monkeypatch.setattr(RULES, "_entries", dict(RULES._entries))  # in which the page registers it
    runpy.run_path(str(source))
    assert_allowed(RULES["equal_energy"](matrices, budget), budget)


def test_a_registered_rule_of_other_ranks_is_refused():
    budget = Budget({"a": (128, 128)}, 0.4, rank_multiple=8)
    matrices = {"a": Components(torch.ones(128), torch.zeros(128))}
    for rank in (12, 60):
        rule = Rule(lambda ms, b, rank=rank: Selection({"a": torch.arange(rank)}, {"a": 0.0}))
        with pytest.raises(ConfigError, match="with rank_multiple 8 its rank must be a multiple of 8"):
            rule(matrices, budget)


@pytest.mark.parametrize(
    ("rank", "ranks"), [(5, [4]), (8, [4]), (9, [8]), (20, [8, 16]), (40, [8, 16, 24, 32]), (1, [])]
)
def test_a_low_rank_layer_has_a_lower_multiple_or_stays(rank, ranks):
    present = {"a": Present(rank, factors(200, 200, rank))}
    budget = Budget({"a": (200, 200), "b": (200, 200)}, 0.5, present=present, rank_multiple=8, planned=True)
    assert list(budget.ranks("a")) == ranks
    g = torch.Generator().manual_seed(0)
    sigma = torch.rand(200, generator=g).sort(descending=True).values
    matrices = {"a": Components(torch.cat([sigma[:rank], torch.zeros(200 - rank)]), torch.zeros(200))}
    matrices["b"] = Components(sigma, torch.zeros(200))
    asked = replace(budget, planned=False, prune_ratio=budget.reached({"a": None, "b": 64}))
    for rule in RULES:
        if rule != "uniform":
            selection = RULES[rule](matrices, asked)
            assert selection.rank("a") in [None, *ranks]
            assert asked.kept({n: selection.rank(n) for n in asked.shapes}) <= asked.allowed


def test_plans_are_followed_whatever_their_ranks(tmp_path):
    budget = Budget({"a": (128, 128), "b": (128, 300)}, 0.4, rank_multiple=8)
    matrices = {name: Components(torch.linspace(2, 1, 128), torch.zeros(128)) for name in budget.shapes}
    selection = RULES["curvature"](matrices, budget)
    assert_allowed(selection, budget)
    Plan.of(selection, budget).write(tmp_path / "plan.yaml")
    text = (tmp_path / "plan.yaml").read_text()
    assert "# Ranks are multiples of 8 (" in text
    content = yaml.safe_load(text)
    assert content["layers"]["a"]["break_even"] == 63  # to which a rank may be changed
    content["layers"]["a"]["rank"], content["layers"]["b"]["rank"] = 63, 11
    (tmp_path / "edited.yaml").write_text(yaml.safe_dump(content))
    plan = Plan.read(tmp_path / "edited.yaml", budget)
    assert plan.ranks == {"a": 63, "b": 11}
    followed = plan.rule(matrices, replace(budget, planned=True))
    assert {name: followed.rank(name) for name in matrices} == {"a": 63, "b": 11}
    Plan.of(selection, replace(budget, rank_multiple=1)).write(tmp_path / "free.yaml")
    assert not re.search("multiples", (tmp_path / "free.yaml").read_text())


def test_options_are_allowed_ranks_and_the_matrix_as_it_is():
    budget = Budget({"a": (128, 128)}, 0.4, rank_multiple=16)
    options = Options.of("a", of_dropping(torch.ones(128)), None, budget)
    assert list(options.ranks) == [8, 16, 24, 32, 40, 48, 56, 128]
    assert options.losses.tolist() == [128.0 - k for k in options.ranks]
