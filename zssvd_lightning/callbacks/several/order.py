"""Checks that refuse compressions in one Trainer that cannot follow one another."""

import logging
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from zssvd_lightning.callbacks.prehab import LowRankPrehab
from zssvd_lightning.callbacks.schedule import ScheduledCompression
from zssvd_lightning.callbacks.trainer.guards import batches_in, first_step, most_accumulated, steps_in
from zssvd_lightning.compression.phase import Phase
from zssvd_lightning.errors import UnsupportedTrainingError

if TYPE_CHECKING:
    from zssvd_lightning.callbacks.zssvd import ZSSVDCallback

logger = logging.getLogger(__name__)


def refuse_several(trainer: L.Trainer, first: "ZSSVDCallback") -> None:
    """Refuse compressions in one Trainer that cannot follow one another. Collective if there are several.

    Args:
        trainer: the Trainer at the start of training.
        first: the first `ZSSVDCallback` among its callbacks.

    Raises:
        UnsupportedTrainingError: the Trainer, or one of its compressions, does not allow several.
        ConfigError: a later recovery does not suit the layers that an earlier compression makes.
    """
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    compressions = [first, *first.fit.turn.later]
    scheduled = [callback for callback in callbacks if isinstance(callback, ScheduledCompression)]
    if len(scheduled) <= 1:
        return
    known = {id(callback) for callback in compressions}
    if others := [type(callback).__name__ for callback in scheduled if id(callback) not in known]:
        raise UnsupportedTrainingError(
            f"the Trainer has a ZSSVDCallback and another callback that compresses ({', '.join(others)}), which would "
            "disturb each other; compress again in a second fit, with a callback of its own"
        )
    _refuse_company(trainer, callbacks, compressions, len(scheduled))
    for before, after in pairwise(compressions):
        _refuse_settings(before, after)
    if trainer.fast_dev_run:  # type: ignore[attr-defined]  # under which each starts once the one before has ended
        return
    with first.fit.adapter.team.together():
        for before, after in pairwise(compressions):
            if before.phase is Phase.WAIT and after.phase is Phase.WAIT:
                _refuse_times(trainer, before, after)
    for before, after in pairwise(compressions):
        _warn_of_unknown_end(trainer, before, after)


def _refuse_company(
    trainer: L.Trainer, callbacks: Sequence[L.Callback], compressions: "Sequence[ZSSVDCallback]", number: int
) -> None:
    """Refuse a strategy or other callbacks beside which there can be only one compression."""
    if not compressions[0].fit.adapter.compresses_again:
        raise UnsupportedTrainingError(
            f"the Trainer has {number} ZSSVDCallbacks, and under {type(trainer.strategy).__name__} low-rank layers "
            "cannot be compressed again during training; train on one device or with strategy='ddp', or call "
            "zssvd_lightning.compress on the model between two fits"
        )
    if len({callback.state_key for callback in compressions}) < number:
        raise UnsupportedTrainingError(
            f"two of the {number} ZSSVDCallbacks of the Trainer have the same state_key "
            f"({compressions[-1].state_key!r}), so that checkpoints could not hold both; pass different objects, and "
            "do not override state_key with a constant"
        )
    if any(isinstance(callback, LowRankPrehab) for callback in callbacks):
        raise UnsupportedTrainingError(
            f"LowRankPrehab prepares dense layers for one compression, and the Trainer has {number}; leave it out, or "
            "run it with the first ZSSVDCallback, and the others in a second fit"
        )
    _refuse_monitors(callbacks, compressions)


def _refuse_monitors(callbacks: Sequence[L.Callback], compressions: "Sequence[ZSSVDCallback]") -> None:
    """Refuse callbacks that rank by a metric of an earlier compression, which no longer changes in the last one.

    All checkpoints of the last compression would have the same score, so that the first of them would count as the
    best, and early stopping would end the fit.
    """
    *earlier, last = [callback.fit.turn.prefix for callback in compressions]
    for callback in callbacks:
        monitor = callback.monitor if isinstance(callback, (ModelCheckpoint, EarlyStopping)) else None
        if prefix := next((each for each in earlier if (monitor or "").startswith(each)), None):
            raise UnsupportedTrainingError(
                f"{type(callback).__name__} monitors {monitor!r}, a metric of compression {earlier.index(prefix) + 1} "
                f"of {len(compressions)}, which no longer changes once the next one starts; monitor "
                f"{str(monitor).replace(prefix, last, 1)!r} of the last compression, or a loss that the module logs"
            )


def _refuse_settings(before: "ZSSVDCallback", after: "ZSSVDCallback") -> None:
    """Refuse settings with which a compression cannot follow another."""
    number, recovery, config = after.fit.turn.number, before.recovery, after.config
    kept = recovery is not None and not recovery.merges
    reasons = (
        (before.dry_run is not False, "its dry run ends the fit; set dry_run only for the last ZSSVDCallback"),
        (
            before.config.form.rounds,
            f"layers with its storage {before.config.storage!r}, in 8 bits, cannot be compressed again; take 'factors'",
        ),
        (kept, "its adapters stay on the factors, which cannot be compressed then; set recovery.merge to true"),
        (
            recovery is not None and recovery.minutes is not None,
            "its recovery ends the fit after recovery.minutes; leave them out, and set the start of the next one",
        ),
        (
            recovery is not None and recovery.patience is not None and before.recovering.is_judged,
            "recovery.patience can end the fit before the next one starts; set it to null",
        ),
    )
    if why := next((reason for holds, reason in reasons if holds), None):
        raise UnsupportedTrainingError(f"compression {number - 1} of the Trainer cannot be followed by another: {why}")
    if config.plan is not None:
        raise UnsupportedTrainingError(
            f"compression {number} of the Trainer has a plan, whose layers do not exist before the earlier one has "
            "ended; follow the plan in a second fit"
        )
    if after.recovery is not None:
        after.recovery.refuse_storage(before.config.storage)


def _refuse_times(trainer: L.Trainer, before: "ZSSVDCallback", after: "ZSSVDCallback") -> None:
    """Raise UnsupportedTrainingError unless a compression is due when the one before it has ended."""
    per_epoch, accumulate = trainer.num_training_batches, most_accumulated(trainer)
    starts, number = first_step(trainer, after.schedule), after.fit.turn.number
    begins = first_step(trainer, before.schedule)
    if starts < begins:
        raise UnsupportedTrainingError(
            f"compression {number} of the Trainer would start at step {starts:g}, before compression {number - 1} at "
            f"step {begins:g}; list the ZSSVDCallbacks in the order in which they start"
        )
    if math.isinf(begins):
        return
    start = int(batches_in(begins, per_epoch, accumulate))
    factorizes = steps_in(start + before.batches_needed(per_epoch, accumulate, start), per_epoch, accumulate)
    ends = factorizes + (before.recovery is not None)
    which = ", with one step of its recovery" if before.recovery is not None else ""
    if starts < ends:
        raise UnsupportedTrainingError(
            f"compression {number} of the Trainer would start at step {starts:g}, but compression {number - 1} takes "
            f"from step {begins:g} to step {ends:g}{which}; start it later, as by "
            f"schedule=Schedule(start_step={ends:g})"
        )


def _warn_of_unknown_end(trainer: L.Trainer, before: "ZSSVDCallback", after: "ZSSVDCallback") -> None:
    """Warn if the schedule of a recovery cannot end where the next compression starts."""
    recovers = before.recovery is not None and before.phase is not Phase.DONE and after.phase is Phase.WAIT
    if recovers and trainer.is_global_zero and math.isinf(first_step(trainer, after.schedule)):
        logger.warning(
            "compression %d starts at epoch %d, and the length of an epoch is not known, so the learning-rate schedule "
            "of the recovery before it runs to the end of the fit instead of to that start; give the start as "
            "schedule=Schedule(start_step=...), or set limit_train_batches to a number",
            after.fit.turn.number,
            after.schedule.start_epoch,
        )
