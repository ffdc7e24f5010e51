"""Rules that choose, for the whole model at once, which components to give up.

A rule sees each matrix as a list of components (sigma descending, delta the predicted change of the loss when one is
dropped) and returns which are kept; of storage it knows what each rank costs. The greedy rules differ in the order a
matrix offers its components in and in whose offer is taken next (`offers`); everything else is `_drop_until_met`,
written once. The others say what each rank loses or weighs, and `allocation` solves for all matrices together.
"""

from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping
from functools import wraps

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from zssvd_lightning.errors import BudgetError, CalibrationError, ConfigError
from zssvd_lightning.selection.budget import Budget
from zssvd_lightning.selection.candidates import Options, of_dropping, of_rounding
from zssvd_lightning.selection.components import Components, Selection
from zssvd_lightning.selection.knapsack import least_loss
from zssvd_lightning.selection.proportional import effective_rank_of, proportional_ranks
from zssvd_lightning.selection.queues import Candidate, Queue, SmallestFirst, ZeroSum

CHOOSE_BITS = ("curvature", "curvature_first_order")
"""The rules that can choose for each matrix between 8 and 16 bits, as storage `mixed` asks."""


BY_CURVATURE = ("curvature", "curvature_first_order", "zero_sum_curvature")
"""The rules that go by the second-order change of the loss."""


Rule = Callable[[Mapping[str, Components], Budget], Selection]


def of_one_form(rule: Rule) -> Rule:
    """The rule; it refuses storage that leaves bits to be chosen. Raises ConfigError."""

    @wraps(rule)
    def refusing(matrices: Mapping[str, Components], budget: Budget) -> Selection:
        if budget.chooses_bits:
            raise ConfigError(
                f"selection {rule.__name__!r} cannot choose between 8 and 16 bits, as storage {budget.storage!r} asks "
                f"of it; use selection {' or '.join(CHOOSE_BITS)}"
            )
        return rule(matrices, budget)

    return refusing


@of_one_form
def zero_sum(matrices: Mapping[str, Components], budget: Budget) -> Selection:
    """The paper's rule: two heaps, and a running sum of delta that is kept near zero (arXiv 2602.02848)."""
    return _drop_until_met(matrices, budget, ZeroSum(lambda offer: abs(offer.delta)))


@of_one_form
def zero_sum_curvature(matrices: Mapping[str, Components], budget: Budget) -> Selection:
    """The zero-sum rule with the size of an offer `1/2 sigma^2` for what a component of its matrix costs on average.

    Delta still tells the sign and makes the running sum. The average, since above break-even a component saves nothing.
    """
    return _drop_until_met(matrices, budget, ZeroSum(lambda offer: offer.second_order / offer.cost))


@of_one_form
def abs_delta(matrices: Mapping[str, Components], budget: Budget) -> Selection:
    """Smallest |delta| first, each matrix offering only its smallest remaining sigma."""
    return _drop_until_met(matrices, budget, SmallestFirst(lambda offer: abs(offer.delta)))


@of_one_form
def abs_delta_unordered(matrices: Mapping[str, Components], budget: Budget) -> Selection:
    """Smallest |delta| first, whatever its sigma: what is left of a matrix need not be a truncation of it."""
    return _drop_until_met(matrices, budget, SmallestFirst(lambda offer: abs(offer.delta)), _by_abs_delta)


@of_one_form
def most_negative(matrices: Mapping[str, Components], budget: Budget) -> Selection:
    """Smallest signed delta first: what promises to lower the loss most."""
    return _drop_until_met(matrices, budget, SmallestFirst(lambda offer: offer.delta))


@of_one_form
def sigma(matrices: Mapping[str, Components], budget: Budget) -> Selection:
    """Smallest singular value first, over all matrices."""
    return _drop_until_met(matrices, budget, SmallestFirst(lambda offer: offer.sigma))


@of_one_form
def uniform(matrices: Mapping[str, Components], budget: Budget) -> Selection:
    """The same fraction of every matrix, for factors `k = floor((1 - prune_ratio) m n / (m + n))`.

    As SVD-LLM does (arXiv 2403.07378).
    """
    ranks = {}
    for name, (m, n) in budget.shapes.items():
        ranks[name] = bisect_right(budget.costs(name), (1 - budget.prune_ratio) * budget.dense(name) + 1e-9) - 1
        if ranks[name] < budget.floor(name):
            raise BudgetError(
                f"uniform ranks give {name} ({m}, {n}) rank {ranks[name]}, below its floor {budget.floor(name)}; "
                "lower min_rank_fraction or prune_ratio, or use a global selection"
            )
    return of_ranks(matrices, budget, ranks)


@of_one_form
def effective_rank(matrices: Mapping[str, Components], budget: Budget) -> Selection:
    """Ranks in proportion to `sqrt(R / c)`, R being the effective rank and c what a component costs on average.

    They are those with the least sum of `R / k` for their cost, which is how D-Rank allocates (arXiv 2509.25622). Here
    every matrix stands alone, where D-Rank has groups of layers share a factor; ranks do not move from queries and keys
    to values; none is below its floor, and a matrix with a rank above the highest that saves anything stays dense.
    """
    names = list(matrices)
    weights = [(effective_rank_of(matrices[name].sigma) / budget.component_cost(name)) ** 0.5 for name in names]
    costs, floors = [budget.costs(name) for name in names], [budget.floor(name) for name in names]
    ranks = proportional_ranks(weights, costs, floors, budget.allowed)
    return of_ranks(matrices, budget, dict(zip(names, ranks, strict=True)))


def curvature(matrices: Mapping[str, Components], budget: Budget) -> Selection:
    """The ranks, dense layers and bits of least loss together, `1/2 sigma^2` being that of dropping a component.

    In the two-sided metric that is the loss to second order, layer by layer and with the curvature that K-FAC estimates
    (arXiv 1503.05671). See `allocation.least_loss`.
    """
    return _of_least_loss(matrices, budget, lambda components: components.second_order)


def curvature_first_order(matrices: Mapping[str, Components], budget: Budget) -> Selection:
    """As `curvature`, with `1/2 sigma^2 + delta`: what is dropped may lower the loss, so more may go than is asked."""
    return _of_least_loss(matrices, budget, lambda components: components.second_order + components.delta.double())


def of_ranks(
    matrices: Mapping[str, Components],
    budget: Budget,
    ranks: Mapping[str, int],
    eight_bit: Collection[str] = (),
) -> Selection:
    """So many of the largest components of each matrix, those in `eight_bit` in 8 bits."""
    return _selection(matrices, budget, {name: torch.arange(rank) for name, rank in ranks.items()}, eight_bit)


RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (
        zero_sum,
        zero_sum_curvature,
        abs_delta,
        abs_delta_unordered,
        most_negative,
        sigma,
        uniform,
        effective_rank,
        curvature,
        curvature_first_order,
    )
}


def _by_sigma(components: Components) -> Tensor:
    return torch.arange(len(components.sigma) - 1, -1, -1)


def _by_abs_delta(components: Components) -> Tensor:
    return torch.argsort(components.delta.abs(), stable=True)


def _drop_until_met(
    matrices: Mapping[str, Components],
    budget: Budget,
    queue: Queue,
    drop_order: Callable[[Components], Tensor] = _by_sigma,
) -> Selection:
    """Drops one component after another until the budget is met. A matrix offers one at a time, in `drop_order`."""
    names = list(matrices)
    orders = [drop_order(matrices[name]).tolist() for name in names]
    sigmas = [matrices[name].sigma.tolist() for name in names]
    deltas = [matrices[name].delta.tolist() for name in names]
    second_orders = [matrices[name].second_order.tolist() for name in names]
    ranks = [len(order) for order in orders]
    floors = [budget.floor(name) for name in names]
    costs = [budget.costs(name) for name in names]
    averages = [budget.component_cost(name) for name in names]

    def offer(i: int) -> None:
        if ranks[i] > floors[i]:
            component = orders[i][len(orders[i]) - ranks[i]]
            queue.offer(
                Candidate(i, sigmas[i][component], deltas[i][component], second_orders[i][component], averages[i])
            )

    for i in range(len(names)):
        offer(i)
    allowed = budget.allowed
    stays = sum(cost[rank] for cost, rank in zip(costs, ranks, strict=True))
    while stays > allowed:
        i = queue.take()
        stays -= costs[i][ranks[i]] - costs[i][ranks[i] - 1]
        ranks[i] -= 1
        offer(i)
    kept = {
        name: torch.tensor(sorted(order[len(order) - rank :]), dtype=torch.long)
        for name, order, rank in zip(names, orders, ranks, strict=True)
    }
    return _selection(matrices, budget, kept)


def _of_least_loss(
    matrices: Mapping[str, Components], budget: Budget, loss_of: Callable[[Components], Tensor]
) -> Selection:
    """What loses least together, of all that each matrix can be kept as; `loss_of` gives that of each component."""
    options = {
        name: Options.of(
            name,
            of_dropping(loss_of(components).cpu()),
            _rounding(name, components) if budget.chooses_bits else None,
            budget,
        )
        for name, components in matrices.items()
    }
    costs = pad_sequence([option.costs for option in options.values()], batch_first=True)
    losses = pad_sequence([option.losses for option in options.values()], batch_first=True, padding_value=torch.inf)
    taken = dict(zip(options, least_loss(costs, losses, budget.allowed).tolist(), strict=True))
    ranks = {name: option.ranks[taken[name]] for name, option in options.items()}
    eight_bit = [name for name, option in options.items() if option.eight_bit[taken[name]]]
    return of_ranks(matrices, budget, ranks, eight_bit)


def _rounding(name: str, components: Components) -> Tensor:
    """What keeping a matrix in 8 bits loses, by rank."""
    if components.rounding is None or components.rounding_dense is None:
        raise CalibrationError(f"{name} has no prediction of what 8 bits would lose; choose a storage of one form")
    return of_rounding(components.rounding.double().cpu(), components.rounding_dense)


def _selection(
    matrices: Mapping[str, Components],
    budget: Budget,
    kept: Mapping[str, Tensor],
    eight_bit: Collection[str] = (),
) -> Selection:
    """Returns matrices above break-even to their dense original, and sums up the drift of the rest."""
    final = {
        name: indices if budget.is_low_rank(name, len(indices), eight_bit=name in eight_bit) else None
        for name, indices in kept.items()
    }
    drifts = {}
    for name, indices in final.items():
        delta = matrices[name].delta.double().cpu()
        drifts[name] = 0.0 if indices is None else float(delta.sum() - delta[indices].sum())
    return Selection(final, drifts, frozenset(eight_bit))
