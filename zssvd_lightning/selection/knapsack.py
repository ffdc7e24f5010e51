"""What to give each of many matrices, so that all together cost no more than they may.

Shapes: N matrices of at most O options each; costs and losses (N, O). A matrix with fewer options has infinite losses
in the places behind them.
"""

import heapq
import math

import torch
from torch import Tensor

NEVER = torch.tensor(math.inf, dtype=torch.float64)


BRANCHES = 64
"""How many cases `least_loss` solves at most; fewer where that would be more than `WORK`."""


WORK = 4_000_000
"""How many options the cases may have together, but for the first. Then one core takes up to half a second for 210
matrices of 577 options, and one and a half for 560 of 8193, of which only the first case is solved."""


TOLERANCE = 1e-6
"""How much more than the least loss is as good, as a fraction of it: losses are predictions."""


def least_loss(costs: Tensor, losses: Tensor, allowed: int) -> Tensor:
    """One option of each matrix, so that the sum of losses is least and the sum of costs at most `allowed`.

    By Lagrangian relaxation (Everett, Operations Research 11, 1963): see `_last_price`. The dearest choice that fits,
    of those that some price leads to, is the optimum where it costs all that is allowed. Elsewhere what is left is
    filled, from it and from the cheapest choice that does not fit with one matrix brought down. A matrix that differs
    between the two is then held to one side or the other, and each case solved in turn, the most promising first
    (branch and bound; Land and Doig, Econometrica 28, 1960), until none can be better or there have been `BRANCHES`.
    The result loses at most what the first choice left, at its price, more than the optimum.

    Of 210 matrices with spectra `s i^-a`, s and a drawn for each, the result was above the bound of the last price by
    1e-6 of it in the median and by 6e-4 in 19 of 20 draws; 2e-5 and 9e-4 by the first case alone.

    Args:
        costs: whole numbers in float64 (N, O), rising from option to option. The cheapest together must fit.
        losses: float64 (N, O).
        allowed: what all may cost together.

    Returns:
        The options taken (N,); of equal ones the cheaper.
    """
    best, least = torch.zeros(len(costs), dtype=torch.long), math.inf
    branches = [(-math.inf, 0, losses)]
    for number in range(min(BRANCHES, 1 + WORK // losses.numel())):
        if not branches or branches[0][0] >= least - TOLERANCE * abs(least):
            break
        possible = heapq.heappop(branches)[2]
        saving, spending, price = _last_price(costs, possible, allowed)
        starts = [saving, *_brought_down(costs, losses, spending, allowed)]
        for options in (_filled(costs, losses, start, allowed) for start in starts):
            if _total(losses, options) < least:
                best, least = options, _total(losses, options)
        bound = _total(losses + price * costs, saving) - price * allowed
        row = int((_of(costs, spending) - _of(costs, saving)).argmax())
        if saving[row] == spending[row]:
            continue
        for side, kept in enumerate((slice(spending[row], None), slice(spending[row]))):
            branch = possible.clone()
            branch[row, kept] = NEVER
            if _total(costs, _cheapest(costs, branch)) <= allowed:
                heapq.heappush(branches, (bound, 2 * number + side + 1, branch))
    return best


def _of(values: Tensor, options: Tensor) -> Tensor:
    """Those of the options taken, (N, 1)."""
    return values.gather(1, options[:, None])


def _total(values: Tensor, options: Tensor) -> float:
    """Their sum, the same in every order of the matrices."""
    return math.fsum(_of(values, options).flatten().tolist())


def _first_of_least(values: Tensor, then: Tensor) -> Tensor:
    """The options of least value, and among those the first with the least of `then`."""
    return then.where(values == values.amin(1, keepdim=True), NEVER).argmin(1)


def _cheapest(costs: Tensor, losses: Tensor) -> Tensor:
    return _first_of_least(costs.where(losses < NEVER, NEVER), losses)


def _last_price(costs: Tensor, losses: Tensor, allowed: int) -> tuple[Tensor, Tensor, float]:
    """The dearest choice that fits, of those that some price leads to, the cheapest that does not, and their price.

    At a price of cost, each matrix takes the option of least loss and price together; nothing that costs as much as
    they then do loses less. Prices are tried until none is left between the two, which are one where all fits for free.
    """
    saving, spending, price = _cheapest(costs, losses), _first_of_least(losses, costs), 0.0
    if _total(costs, spending) <= allowed:
        return spending, spending, price
    while True:
        loss = _total(losses, saving) - _total(losses, spending)
        price = loss / (_total(costs, spending) - _total(costs, saving))
        between = (losses + price * costs).argmin(1)
        if not _total(costs, saving) < _total(costs, between) < _total(costs, spending):
            return saving, spending, price
        if _total(costs, between) <= allowed:
            saving = between
        else:
            spending = between


def _brought_down(costs: Tensor, losses: Tensor, options: Tensor, allowed: int) -> list[Tensor]:
    """Options that fit through a change to the one matrix at which it loses least; none where one is not enough."""
    enough = _of(costs, options) - costs >= _total(costs, options) - allowed
    lost = (losses - _of(losses, options)).where(enough, NEVER)
    row, option = divmod(int(lost.argmin()), lost.shape[1])
    if lost[row, option] == NEVER:
        return []
    changed = options.clone()
    changed[row] = option
    return [changed]


def _filled(costs: Tensor, losses: Tensor, options: Tensor, allowed: int) -> Tensor:
    """Changes one matrix after another, to what gains most for its cost of all that still fits, until nothing does."""
    options, left = options.clone(), allowed - _total(costs, options)
    best = _worth(costs, losses, options[:, None], left).max(1)
    coming = [
        (-worth, row, option)
        for row, (worth, option) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True))
    ]
    heapq.heapify(coming)
    while coming and coming[0][0] < math.inf:
        _, row, option = heapq.heappop(coming)
        extra = float(costs[row, option] - costs[row, options[row]])
        if extra <= left:
            options[row] = option
            left -= extra
        worth = _worth(costs[row], losses[row], options[row, None], left)
        option = int(worth.argmax())
        heapq.heappush(coming, (-float(worth[option]), row, option))
    return options


def _worth(costs: Tensor, losses: Tensor, options: Tensor, left: float) -> Tensor:
    """What each option gains on those taken, for each unit that it costs more; -inf where that is nothing or too much.

    Args:
        costs: (..., O).
        losses: (..., O).
        options: those taken (..., 1).
        left: how much more may be spent.
    """
    extra, gain = costs - costs.gather(-1, options), losses.gather(-1, options) - losses
    return (gain / extra.clamp_min(1)).where((gain > 0) & (extra <= left), -NEVER)
