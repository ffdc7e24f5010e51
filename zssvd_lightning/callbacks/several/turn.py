"""Turns of several compressions in one Trainer: their names, and the step from one to the next."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lightning as L

from zssvd_lightning.callbacks.announcements import progress_of
from zssvd_lightning.callbacks.trainer import telemetry
from zssvd_lightning.callbacks.trainer.guards import refuse_stale_groups
from zssvd_lightning.compression.phase import Phase
from zssvd_lightning.errors import CheckpointError

if TYPE_CHECKING:
    from zssvd_lightning.callbacks.lifecycle import Lifecycle
    from zssvd_lightning.callbacks.zssvd import ZSSVDCallback

logger = logging.getLogger(__name__)

LATER_KEY = re.compile(r"\{'compression': \d+\}$")
"""End of the key of a later compression in checkpoints."""


@dataclass(frozen=True, eq=False)
class Turn:
    """Turn of one compression among those of its Trainer, which run in the order of the Trainer's callbacks.

    Attributes:
        number: number of the compression, from 1 on; 0 until a Trainer has run it.
        earlier: the compressions before it, which must have ended when it starts.
        later: the compressions after it.
    """

    number: int = 0
    earlier: "Sequence[ZSSVDCallback]" = ()
    later: "Sequence[ZSSVDCallback]" = ()

    @classmethod
    def of(cls, callback: "ZSSVDCallback", everyone: "Sequence[ZSSVDCallback]") -> "Turn":
        """Return the turn of a callback among all of its Trainer. One that another callback calls has the only turn."""
        if callback not in everyone:
            return cls(1)
        index = everyone.index(callback)
        return cls(index + 1, everyone[:index], [each for each in everyone[index + 1 :] if each is not callback])

    def key(self, plain: str) -> str:
        """Return the key of the compression in checkpoints, given that of its class, which the first one has.

        Before a Trainer has run the callback, no other has the same key, since a Trainer takes no two with one key.
        """
        if self.number == 0:
            return f"{plain}{{'object': {id(self)}}}"
        return plain if self.number == 1 else f"{plain}{{'compression': {self.number}}}"

    @property
    def title(self) -> str:
        """Name of the compression in messages and on the progress bar: `compression`, `compression 2`, ..."""
        return "compression" if self.number <= 1 else f"compression {self.number}"

    @property
    def which(self) -> str:
        """Part of a message that says which compression of several it is of; empty for the first."""
        return f" of {self.title}" if self.number > 1 else ""

    @property
    def prefix(self) -> str:
        """Start of the names of its metrics."""
        return telemetry.prefix_of(self.number)

    @property
    def may_begin(self) -> bool:
        """True if every earlier compression has factorized the model."""
        return all(callback.phase in (Phase.RECOVER, Phase.DONE) for callback in self.earlier)

    @property
    def can_be_tried(self) -> bool:
        """True if no earlier compression is under way, whose changes of the model would be in the way of a check."""
        return all(callback.phase in (Phase.WAIT, Phase.DONE) for callback in self.earlier)

    @property
    def later_has_started(self) -> bool:
        """True if a later compression has started."""
        return any(callback.phase is not Phase.WAIT for callback in self.later)

    def shown(self, trainer: L.Trainer, mine: "Lifecycle") -> tuple[str, str]:
        """Return the title and progress of the latest compression that has started, for a progress bar.

        Args:
            trainer: the Trainer.
            mine: lifecycle of this compression, which counts as started.
        """
        turn, life = self, mine
        for callback in self.later:
            if callback.phase is not Phase.WAIT:
                turn, life = callback.fit.turn, callback.run.life
        return turn.title, progress_of(life, min(trainer.num_training_batches, life.epoch_length))

    def take_over(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """End the training of the factors by the compression before this one, if there is one. Collective."""
        if self.earlier:
            _end(self.earlier[-1], trainer, module)

    def refuse_checkpoint(self, callbacks: Mapping[str, Any]) -> None:
        """Raise CheckpointError if a checkpoint has the state of a later compression that the Trainer does not have.

        Args:
            callbacks: states of the callbacks in the checkpoint.
        """
        present = {callback.state_key for callback in self.later} if self.number == 1 else callbacks.keys()
        if lost := [key for key in callbacks if LATER_KEY.search(str(key)) and key not in present]:
            raise CheckpointError(
                f"the checkpoint is of a fit with several compressions, of which this Trainer lacks {', '.join(lost)}; "
                "go on with the same callbacks in the same order"
            )


def _end(before: "ZSSVDCallback", trainer: L.Trainer, module: L.LightningModule) -> None:
    """End a compression as the end of the fit would, and give the module the optimizers of `configure_optimizers`."""
    life = before.run.life
    recovery = life.active_recovery
    if recovery is not None and trainer.global_step == recovery.first_step and trainer.is_global_zero:
        logger.warning(
            "the recovery of compression %d has trained no step, because the next compression starts at once; "
            "start that one later, unless this is a fast_dev_run",
            before.fit.turn.number,
        )
    before.recovering.settle(trainer, module, life)
    before.run.end_training(trainer, module)
    before.recovering.finish(module, life)
    if recovery is not None:
        before.fit.adapter.rebuild_optimizers()
        refuse_stale_groups(trainer, module)
        recovery.over = False  # it has no optimizers in the Trainer any more
