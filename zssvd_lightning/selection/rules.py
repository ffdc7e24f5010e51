"""Selection rules, which choose the components to drop for the whole model at once.

The input of a rule is a list of components per matrix: sigma in descending order, and delta, the predicted change of
the loss from dropping each. The output is the set of remaining components. The rule knows the cost of each rank and
nothing else about storage. Greedy rules differ in the order in which a matrix offers its components and in the queue
(`queues`) that picks the next ones; `_drop_until_met` does the rest. The other rules state the loss or weight of each
rank, and `knapsack` or `proportional` solves for all matrices together.

Ranks are those of `Budget.ranks`. With `rank_multiple` 1, every rule is the published one. With more, a matrix gains
and loses whole steps: a greedy rule orders steps by the mean over their components of what it orders components by.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from zssvd_lightning._registry import Registry, instance_of
from zssvd_lightning.errors import ConfigError
from zssvd_lightning.selection.budget import Budget
from zssvd_lightning.selection.candidates import Options, of_dropping, rounding_losses
from zssvd_lightning.selection.checks import checked
from zssvd_lightning.selection.components import Components, Selection
from zssvd_lightning.selection.knapsack import least_loss
from zssvd_lightning.selection.proportional import effective_rank_of, proportional_ranks, uniform_ranks
from zssvd_lightning.selection.queues import Candidate, Queue, SmallestFirst, ZeroSum
from zssvd_lightning.selection.removals import Removal, removed_together, rows_of, sizes_of, taken_of, with_removals
from zssvd_lightning.selection.walk import Walk
from zssvd_lightning.selection.widths.narrowings import Narrowing, narrower_together, with_narrowings

Select = Callable[..., Selection]
"""Function that selects the remaining components of all matrices (`Mapping[str, Components]`) within a `Budget`."""


@dataclass(frozen=True)
class Rule:
    """Selection rule, which is called like its function.

    Raises:
        ConfigError: on a call, if the storage leaves a choice of bits that the rule cannot make, or the result is no
            selection within the budget.
    """

    select: Select
    """The function."""
    chooses_bits: bool = False
    """True if it can choose between 8 and 16 bits per matrix, as storage `mixed` requires."""
    uses_curvature: bool = False
    """True if it uses the second-order change of the loss."""
    keeps_largest: bool = False
    """True if what remains of a matrix is always its largest singular values, so that no other factors need to be
    stored."""

    removes: bool = False
    """True if the function takes experts that may be removed (`Removal`) as a third argument."""
    narrows: bool = False
    """True if it takes hidden widths that may be narrower (`Narrowing`) as a fourth argument."""

    def __call__(
        self,
        matrices: Mapping[str, Components],
        budget: Budget,
        removals: Collection[Removal] = (),
        narrowings: Sequence[Narrowing] = (),
    ) -> Selection:
        """Select the remaining components of all matrices within the budget, experts and hidden units to remove."""
        registered = RULES.those(lambda rule: rule is self)
        name = registered[0] if registered else getattr(self.select, "__name__", repr(self.select))
        if budget.chooses_bits and not self.chooses_bits:
            raise ConfigError(
                f"selection {name!r} cannot choose between 8 and 16 bits, as storage {budget.storage!r} asks "
                f"of it; use selection {' or '.join(RULES.those(lambda rule: rule.chooses_bits))}"
            )
        further = (removals, narrowings) if narrowings else (removals,) if removals else ()
        return checked(self.select(matrices, budget, *further), matrices, budget, name, removals)


def zero_sum(matrices: Mapping[str, Components], budget: Budget) -> Selection:
    """Apply the zero-sum rule: two heaps, with the running sum of delta held near zero (arXiv 2602.02848)."""
    return _drop_until_met(matrices, budget, ZeroSum(lambda offer: offer.magnitude))


def zero_sum_curvature(matrices: Mapping[str, Components], budget: Budget) -> Selection:
    """Apply the zero-sum rule with candidates ordered by second-order change of the loss per mean component cost.

    The second-order change is `1/2 sigma^2` times the curvature. Delta still gives the sign and the running sum. The
    cost is a mean because dropping a component above break-even saves nothing.
    """
    return _drop_until_met(matrices, budget, ZeroSum(lambda offer: offer.second_order / offer.cost))


def abs_delta(matrices: Mapping[str, Components], budget: Budget) -> Selection:
    """Drop the smallest |delta| first, where each matrix offers only its smallest remaining sigma."""
    return _drop_until_met(matrices, budget, SmallestFirst(lambda offer: offer.magnitude))


def abs_delta_unordered(matrices: Mapping[str, Components], budget: Budget) -> Selection:
    """Drop the smallest |delta| first, regardless of sigma. The result need not be a truncation of the matrix."""
    return _drop_until_met(matrices, budget, SmallestFirst(lambda offer: offer.magnitude), _by_abs_delta)


def most_negative(matrices: Mapping[str, Components], budget: Budget) -> Selection:
    """Drop the smallest signed delta first: the component predicted to lower the loss most."""
    return _drop_until_met(matrices, budget, SmallestFirst(lambda offer: offer.delta / offer.components))


def sigma(matrices: Mapping[str, Components], budget: Budget) -> Selection:
    """Drop the smallest singular value first, over all matrices."""
    return _drop_until_met(matrices, budget, SmallestFirst(lambda offer: offer.sigma))


def uniform(matrices: Mapping[str, Components], budget: Budget) -> Selection:
    """Remove the same fraction of every matrix, as SVD-LLM does (arXiv 2403.07378).

    With storage `factors` the rank is `k = floor((1 - prune_ratio) m n / (m + n))`. Where ranks have steps of several
    components, it is the next multiple below; then the matrices that miss their share by most, as a fraction of
    their cost, get one step more while the budget lasts.

    Raises:
        BudgetError: a rank is below the floor of its matrix.
    """
    return of_ranks(matrices, budget, uniform_ranks(budget))


def effective_rank(matrices: Mapping[str, Components], budget: Budget) -> Selection:
    """Choose ranks in proportion to `sqrt(R / c)`, where R is the effective rank and c the mean component cost.

    These ranks minimize the sum of `R / k` at a given cost, as D-Rank does (arXiv 2509.25622). Differences from D-Rank:
    every matrix stands alone instead of sharing a factor with a group of layers; ranks do not move from queries and
    keys to values; no rank is below its floor; and a matrix whose rank saves nothing stays dense.
    """
    names = list(matrices)
    weights = [(effective_rank_of(matrices[name].sigma) / budget.component_cost(name)) ** 0.5 for name in names]
    costs, stops = [budget.costs(name) for name in names], [budget.stops(name) for name in names]
    ranks = proportional_ranks(weights, costs, stops, budget.allowed)
    return of_ranks(matrices, budget, dict(zip(names, ranks, strict=True)))


def curvature(
    matrices: Mapping[str, Components],
    budget: Budget,
    removals: Collection[Removal] = (),
    narrowings: Sequence[Narrowing] = (),
) -> Selection:
    """Choose the ranks, dense layers and bits with the least total loss, counting `1/2 sigma^2` per dropped component.

    In the two-sided metric this is the second-order loss, layer by layer, with the curvature estimated by K-FAC
    (arXiv 1503.05671). It is multiplied by the curvature of the component, if estimated. See `knapsack.least_loss`.
    Removing an expert, or hidden units, counts its second-order change of the loss.
    """
    return _of_least_loss(
        matrices,
        budget,
        lambda components: components.second_order,
        lambda removed: removed.second_order,
        removals,
        narrowings,
    )


def curvature_first_order(
    matrices: Mapping[str, Components],
    budget: Budget,
    removals: Collection[Removal] = (),
    narrowings: Sequence[Narrowing] = (),
) -> Selection:
    """Apply `curvature` with `1/2 sigma^2 + delta` per dropped component, and both changes per removal.

    A drop may then be predicted to lower the loss, so the result may remove more than the budget requires.
    """
    return _of_least_loss(
        matrices,
        budget,
        lambda components: components.second_order + components.delta.double(),
        lambda removed: removed.second_order + removed.first_order,
        removals,
        narrowings,
    )


def of_ranks(
    matrices: Mapping[str, Components],
    budget: Budget,
    ranks: Mapping[str, int],
    eight_bit: Collection[str] = (),
) -> Selection:
    """Select the largest components of each matrix up to its rank, and store the matrices in `eight_bit` in 8 bits.

    A rank that is no multiple of the step of its matrix is raised to the next one, as `Budget.costs` counts it.
    """
    raised = {name: budget.rounded_up(name, rank, eight_bit=name in eight_bit) for name, rank in ranks.items()}
    return _selection(matrices, budget, {name: torch.arange(rank) for name, rank in raised.items()}, eight_bit)


RULES: Registry[Rule] = Registry(
    "selection",
    "zssvd_lightning.rules",
    {
        "zero_sum": Rule(zero_sum, keeps_largest=True),
        "zero_sum_curvature": Rule(zero_sum_curvature, uses_curvature=True, keeps_largest=True),
        "abs_delta": Rule(abs_delta, keeps_largest=True),
        "abs_delta_unordered": Rule(abs_delta_unordered),
        "most_negative": Rule(most_negative, keeps_largest=True),
        "sigma": Rule(sigma, keeps_largest=True),
        "uniform": Rule(uniform, keeps_largest=True),
        "effective_rank": Rule(effective_rank, keeps_largest=True),
        "curvature": Rule(
            curvature, chooses_bits=True, uses_curvature=True, keeps_largest=True, removes=True, narrows=True
        ),
        "curvature_first_order": Rule(
            curvature_first_order,
            chooses_bits=True,
            uses_curvature=True,
            keeps_largest=True,
            removes=True,
            narrows=True,
        ),
    },
    instance_of(Rule, "select"),
)
"""Rules by name; `register` adds one."""


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
    """Drop components until the budget is met. Each matrix offers those of its next step, in `drop_order`.

    A step ends at the next lower stop of `Budget.stops`. Above the highest low rank, steps are single components.
    """
    names = list(matrices)
    orders = [drop_order(matrices[name]).tolist() for name in names]
    sigmas = [matrices[name].sigma.tolist() for name in names]
    deltas = [matrices[name].delta.tolist() for name in names]
    second_orders = [matrices[name].second_order.tolist() for name in names]
    ranks = [len(order) for order in orders]
    lower = [list(budget.stops(name)[:-1]) for name in names]
    costs = [budget.costs(name) for name in names]
    averages = [budget.component_cost(name) for name in names]

    def offer(i: int) -> None:
        if lower[i]:
            full = len(orders[i])
            step = orders[i][full - ranks[i] : full - lower[i][-1]]
            delta = [deltas[i][component] for component in step]
            queue.offer(
                Candidate(
                    matrix=i,
                    components=len(step),
                    sigma=sum(sigmas[i][component] for component in step) / len(step),
                    delta=sum(delta),
                    magnitude=sum(map(abs, delta)) / len(step),
                    second_order=sum(second_orders[i][component] for component in step) / len(step),
                    cost=averages[i],
                )
            )

    for i in range(len(names)):
        offer(i)
    allowed = budget.allowed
    stays, walk = sum(cost[rank] for cost, rank in zip(costs, ranks, strict=True)), Walk()
    while stays > allowed:
        i = queue.take()
        rank, full = lower[i].pop(), len(orders[i])
        for component in orders[i][full - ranks[i] : full - rank]:
            walk.add(deltas[i][component])
        stays -= costs[i][ranks[i]] - costs[i][rank]
        ranks[i] = rank
        offer(i)
    kept = {
        name: torch.tensor(sorted(order[len(order) - rank :]), dtype=torch.long)
        for name, order, rank in zip(names, orders, ranks, strict=True)
    }
    return replace(_selection(matrices, budget, kept), walk=walk)


def _of_least_loss(
    matrices: Mapping[str, Components],
    budget: Budget,
    loss_of: Callable[[Components], Tensor],
    loss_of_removed: Callable[[Any], Any],
    removals: Collection[Removal],
    narrowings: Sequence[Narrowing],
) -> Selection:
    """Select the options with the least total loss.

    Args:
        matrices: components of each matrix.
        budget: budget to meet.
        loss_of: function that gives the loss of each dropped component (r,).
        loss_of_removed: function that gives the loss of a `Removal`, and the losses of a `Narrowing`.
        removals: experts that may be removed.
        narrowings: hidden widths that may be narrower.
    """
    options = {
        name: Options.of(
            name,
            of_dropping(loss_of(components).cpu()),
            rounding_losses(name, components) if budget.chooses_bits else None,
            budget,
        )
        for name, components in matrices.items()
    }
    shared = removed_together(removals, loss_of_removed)
    rows = rows_of(options, [*shared, *narrower_together(narrowings, budget, removals, loss_of_removed)])
    costs = pad_sequence([row.costs for row in rows], batch_first=True)
    losses = pad_sequence([row.losses for row in rows], batch_first=True, padding_value=torch.inf)
    chosen = least_loss(costs, losses, budget.allowed).tolist()
    taken, sizes = taken_of(rows, chosen), sizes_of(rows, chosen)
    full = {name: len(components.sigma) if sizes.get(name) else 0 for name, components in matrices.items()}
    ranks = {name: option.ranks[taken[name]] if name in taken else full[name] for name, option in options.items()}
    eight_bit = [name for name, option in options.items() if name in taken and option.eight_bit[taken[name]]]
    selection = with_removals(of_ranks(matrices, budget, ranks, eight_bit), removals)
    return with_narrowings(selection, sizes, narrowings)


def _selection(
    matrices: Mapping[str, Components],
    budget: Budget,
    kept: Mapping[str, Tensor],
    eight_bit: Collection[str] = (),
) -> Selection:
    """Build a selection: matrices above break-even stay as they are, and the drift of the others is summed."""
    final = {
        name: indices if budget.is_low_rank(name, len(indices), eight_bit=name in eight_bit) else None
        for name, indices in kept.items()
    }
    drifts = {}
    for name, indices in final.items():
        delta = matrices[name].delta.double().cpu()
        drifts[name] = 0.0 if indices is None else float(delta.sum() - delta[indices].sum())
    return Selection(final, drifts, frozenset(eight_bit))
