import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence

from zssvd_lightning.selection.budget import Budget
from zssvd_lightning.selection.candidates import Options, of_dropping, of_rounding
from zssvd_lightning.selection.knapsack import least_loss
from zssvd_lightning.selection.proportional import effective_rank_of, proportional_ranks
from zssvd_lightning.selection.storages import STORAGES


def random_options(seed, matrices=4, most=6, *, falling=True):
    """Options of rising cost, some rows shorter than others."""
    g = torch.Generator().manual_seed(seed)
    costs, losses = torch.zeros(matrices, most), torch.full((matrices, most), math.inf)
    for row in range(matrices):
        count = int(torch.randint(1, most + 1, (1,), generator=g))
        costs[row, :count] = torch.randint(1, 12, (count,), generator=g).cumsum(0)
        found = torch.randn(count, generator=g)
        losses[row, :count] = found.abs().flip(0).cumsum(0).flip(0) if falling else found
    return costs.double(), losses.double()


def all_of(costs, losses):
    """(cost, loss) of every combination there is."""
    rows = [
        [(c, x) for c, x in zip(cost, loss, strict=True) if x < math.inf]
        for cost, loss in zip(costs.tolist(), losses.tolist(), strict=True)
    ]
    return [tuple(map(sum, zip(*combination, strict=True))) for combination in itertools.product(*rows)]


def totals(costs, losses, options):
    return tuple(values.gather(1, options[:, None]).sum().item() for values in (costs, losses))


def hull(points):
    """Of the best at each cost, those that some price leads to."""
    best = {}
    for cost, loss in points:
        best[cost] = min(loss, best.get(cost, math.inf))
    corners = []
    for point in sorted(best.items()):
        while len(corners) > 1 and (corners[-1][1] - corners[-2][1]) * (point[0] - corners[-2][0]) >= (
            point[1] - corners[-2][1]
        ) * (corners[-1][0] - corners[-2][0]):
            corners.pop()
        corners.append(point)
    least = min(loss for _, loss in corners)
    return list(itertools.takewhile(lambda p: p[1] > least, corners)) + [p for p in corners if p[1] == least][:1]


@pytest.mark.parametrize("falling", [True, False])
@pytest.mark.parametrize("seed", range(10))
def test_the_optimum_is_found_wherever_a_price_leads_to_it(seed, falling):
    costs, losses = random_options(seed, falling=falling)
    corners = hull(all_of(costs, losses))
    assert corners
    for cost, loss in corners:
        assert totals(costs, losses, least_loss(costs, losses, int(cost))) == pytest.approx((cost, loss))


@pytest.mark.parametrize("falling", [True, False])
@pytest.mark.parametrize("seed", range(10))
def test_between_prices_it_fits_nothing_more_fits_and_the_gap_is_bounded(seed, falling):
    costs, losses = random_options(seed, falling=falling)
    points = all_of(costs, losses)
    corners = hull(points)
    for allowed in range(int(corners[0][0]), int(costs.amax(1).sum()) + 2, 3):
        options = least_loss(costs, losses, allowed)
        cost, loss = totals(costs, losses, options)
        optimum = min(x for c, x in points if c <= allowed)
        below = [corner for corner in corners if corner[0] <= allowed][-1:]
        above = [corner for corner in corners if corner[0] > allowed][:1]
        assert cost <= allowed
        assert loss >= optimum - 1e-9
        if below and above:
            price = (below[0][1] - above[0][1]) / (above[0][0] - below[0][0])
            assert loss <= below[0][1] + 1e-9
            assert loss - optimum <= price * (allowed - below[0][0]) + 1e-9
        else:
            assert loss == pytest.approx(optimum)
        extra, gain = costs - costs.gather(1, options[:, None]), losses.gather(1, options[:, None]) - losses
        assert not ((gain > 1e-9) & (extra <= allowed - cost)).any()


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_matrices_does_not_matter(seed):
    costs, losses = random_options(seed, matrices=7)
    allowed = int(0.5 * costs.amax(1).sum() + 0.5 * costs[:, 0].sum())
    one, other = least_loss(costs, losses, allowed), least_loss(costs.flip(0), losses.flip(0), allowed)
    assert torch.equal(one, other.flip(0))


def test_what_gains_nothing_is_not_paid_for():
    costs, losses = torch.tensor([[1.0, 2.0, 5.0]]).double(), torch.tensor([[3.0, 1.0, 1.0]]).double()
    assert least_loss(costs, losses, 100).tolist() == [1]


def bound(costs, losses, allowed):
    """The most that any price promises: no choice that fits loses less (weak duality). By bisection."""
    low, high, best = 0.0, float(losses[losses < math.inf].max()), -math.inf
    for _ in range(60):
        price = (low + high) / 2
        priced = losses + price * costs
        best = max(best, float(priced.amin(1).sum()) - price * allowed)
        low, high = (low, price) if totals(costs, losses, priced.argmin(1))[0] <= allowed else (price, high)
    return best


SMOLLM2 = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)] * 30


@pytest.mark.parametrize("storage", STORAGES)
def test_as_many_options_as_a_real_model_has(storage):
    g = torch.Generator().manual_seed(0)
    budget = Budget({str(i): shape for i, shape in enumerate(SMOLLM2)}, 0.6, storage=storage)
    options = []
    for name in budget.shapes:
        scale, decay = torch.rand(2, generator=g, dtype=torch.float64)
        sigma = 10 ** (2 * scale - 1) * torch.arange(1, len(budget.costs(name)), dtype=torch.float64) ** (-0.1 - decay)
        rounding = 1e-4 * sigma.square()
        rounded = of_rounding(rounding, float(rounding.sum())) if budget.chooses_bits else None
        options.append(Options.of(name, of_dropping(sigma.square() / 2), rounded, budget))
    costs = pad_sequence([option.costs for option in options], batch_first=True)
    losses = pad_sequence([option.losses for option in options], batch_first=True, padding_value=math.inf)
    cost, loss = totals(costs, losses, least_loss(costs, losses, budget.allowed))
    assert cost <= budget.allowed
    least, gap = bound(costs, losses, budget.allowed), 3e-3 if budget.chooses_bits else 1e-3
    assert least * (1 - 1e-9) <= loss <= least * (1 + gap)


@given(r=st.integers(1, 40), scale=st.floats(1e-3, 1e3))
def test_a_flat_spectrum_has_its_full_effective_rank(r, scale):
    assert effective_rank_of(torch.full((r,), scale)) == pytest.approx(r)
    assert effective_rank_of(torch.cat([torch.full((r,), scale), torch.zeros(7)])) == pytest.approx(r)


def test_effective_rank_is_that_of_the_entropy_of_squares():
    assert effective_rank_of(torch.tensor([5.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_rank_of(torch.zeros(3)) == pytest.approx(1)
    shares = [0.64, 0.36]
    assert effective_rank_of(torch.tensor([0.8, 0.6])) == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))


def at(t, weights, costs, floors):
    return [
        min(len(cost) - 1, max(floor, math.floor(t * weight)))
        for weight, cost, floor in zip(weights, costs, floors, strict=True)
    ]


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.floats(0.1, 3.0), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
    share=st.floats(0.0, 1.0),
)
def test_proportional_ranks_are_those_of_the_largest_multiplier_and_what_else_fits(weights, seed, share):
    g = torch.Generator().manual_seed(seed)
    costs = [[0, *torch.randint(1, 9, (8,), generator=g).cumsum(0).tolist()] for _ in weights]
    floors = torch.randint(1, 4, (len(weights),), generator=g).tolist()

    def cost_of(ranks):
        return sum(cost[rank] for cost, rank in zip(costs, ranks, strict=True))

    allowed = cost_of(floors) + int(share * (cost_of([8] * len(weights)) - cost_of(floors)))
    ranks = proportional_ranks(
        weights, costs, [range(floor, len(cost)) for floor, cost in zip(floors, costs, strict=True)], allowed
    )
    reached = [0.0, *((k + 1e-9) / weight for weight in weights for k in range(1, 9))]
    t = max(t for t in reached if cost_of(at(t, weights, costs, floors)) <= allowed)
    assert all(rank >= least for rank, least in zip(ranks, at(t, weights, costs, floors), strict=True))
    left = allowed - cost_of(ranks)
    assert left >= 0
    assert all(rank == 8 or cost[rank + 1] - cost[rank] > left for rank, cost in zip(ranks, costs, strict=True))
