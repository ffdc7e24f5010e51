"""Check that each compression of a Trainer asks for more than the one before it removes."""

from itertools import pairwise
from typing import TYPE_CHECKING

from zssvd_lightning.compression.phase import Phase
from zssvd_lightning.config.derived import OPT_INS
from zssvd_lightning.errors import BudgetError

if TYPE_CHECKING:
    from zssvd_lightning.callbacks.zssvd import ZSSVDCallback

SAME = ("budget_in", "include", "ignore", *OPT_INS)
"""Settings that are equal if two ratios count the same layers in the same unit."""


def compare_ratios(first: "ZSSVDCallback") -> None:
    """Refuse ratios that are reached already, and let go of the layers, which will be others when the later ones start.

    Args:
        first: the first of several compressions. All of them know their budgets, unless an earlier one is under way.

    Raises:
        BudgetError: a compression asks for no more than the one before it.
    """
    for before, after in pairwise([first, *first.fit.turn.later]):
        if before.phase is after.phase is Phase.WAIT and after.fit.turn.can_be_tried:
            _refuse_reached(before, after)
    for later in first.fit.turn.later:
        if later.phase is Phase.WAIT:
            later.run.life.release()


def _refuse_reached(before: "ZSSVDCallback", after: "ZSSVDCallback") -> None:
    """Raise BudgetError if the earlier compression of the same layers reaches the ratio of the later one."""
    ours, theirs, number = after.config, before.config, after.fit.turn.number
    comparable = theirs.plan is None and all(getattr(theirs, name) == getattr(ours, name) for name in SAME)
    asked, next_asked = (each.run.life.compression.budget for each in (before, after))
    of_rest = ours.ratio_of == "present" or (theirs.ratio_of == "present" and asked.present)
    first, second = asked.prune_ratio, next_asked.prune_ratio
    if comparable and not of_rest and second <= first:
        raise BudgetError(
            f"compression {number} of the Trainer has prune_ratio {ours.prune_ratio} of the {ours.budget_of} "
            f"({second:.4g} of the target layers), which compression {number - 1} with {theirs.prune_ratio} of the "
            f"{theirs.budget_of} ({first:.4g}) has reached already; ask for more, or set ratio_of to 'present'"
        )
