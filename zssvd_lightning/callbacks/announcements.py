"""Messages of a fit about its compression: its course, its cost and its result."""

import math
from collections.abc import Callable

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from zssvd_lightning._contexts import evaluation_mode
from zssvd_lightning.callbacks.lifecycle import Lifecycle
from zssvd_lightning.callbacks.schedule import Schedule
from zssvd_lightning.callbacks.trainer.guards import most_accumulated, steps_in, steps_left
from zssvd_lightning.compression.memory.statements import memory_of_statistics
from zssvd_lightning.compression.phase import Phase
from zssvd_lightning.compression.report import Report
from zssvd_lightning.serialization.checkpoint_mixin import LowRankCheckpointMixin


def announce(
    trainer: L.Trainer, life: Lifecycle, schedule: Schedule, title: str = "compression", *, plans: bool = False
) -> None:
    """Show which share of the model will be compressed, when, in how many steps without training, and in what memory.

    Args:
        trainer: the Trainer at the start of training.
        life: lifecycle of the compression that was attached to the model.
        schedule: start and length of the compression.
        title: name of the compression.
        plans: whether only the ranks are written.
    """
    coverage, removed = life.compression.coverage, life.compression.budget.of_parameters
    rank_zero_info(coverage.summary(removed))
    if (warning := coverage.warning(removed)) is not None:
        rank_zero_warn(warning)
    if life.phase is Phase.WAIT:
        needed = life.batches_needed(trainer.num_training_batches, most_accumulated(trainer), first_only=plans)
        corrections = life.config.corrections
        rank_zero_info(course_of(trainer, corrections, schedule, needed, title, plans=plans))
        rank_zero_info(memory_of_statistics(life.compression))


def course_of(
    trainer: L.Trainer,
    corrections: int,
    schedule: Schedule,
    needed: int,
    title: str = "compression",
    *,
    plans: bool = False,
) -> str:
    """Return a sentence on when the compression runs and what it costs; see `announce`."""
    steps = steps_in(needed, trainer.num_training_batches, most_accumulated(trainer))
    total = steps_left(trainer)
    corrections = 0 if plans else corrections
    several = "s" if corrections > 1 else ""
    purpose = f"calibration and {corrections} correction{several}" if corrections else "calibration"
    share = "" if math.isinf(total) else f" of the {total:g}"
    if plans:
        end = "then it writes the ranks and stops"
    elif schedule.extend_training:
        end = "extend_training=True adds them to the fit; then the low-rank model is trained"
    else:
        end = "extend_training=True would add them to the fit; then the low-rank model is trained"
    return (
        f"{title} starts {_start(schedule)} and observes {needed:g} batches ({purpose}), in which {steps:g}{share} "
        f"optimizer steps change no weight; {end}"
    )


def _start(schedule: Schedule) -> str:
    """Return when a compression starts, such as `at epoch 2, from step 100 on`."""
    epoch = f"at epoch {schedule.start_epoch}" if schedule.start_epoch else ""
    step = f"from step {schedule.start_step} on" if schedule.start_step else ""
    return ", ".join(filter(None, (epoch, step))) or "at once"


def progress_of(life: Lifecycle, batches_per_epoch: float) -> str:
    """Return the phase of a compression, with the batches it has gathered and will gather, for a progress bar."""
    if not life.gathering:
        return life.phase.value
    return f"{life.phase} {life.batches}/{life.limit(life.phase, batches_per_epoch)}"


def conclude(report: Report | None, module: L.LightningModule) -> None:
    """Show the table of a compression, and how the checkpoints of the module load from now on."""
    rank_zero_info("\n%s", report)
    if not isinstance(module, LowRankCheckpointMixin):
        rank_zero_info(
            "from now on, load checkpoints with zssvd_lightning.load_from_checkpoint(%s, path), or give the class the "
            "base class LowRankCheckpointMixin; a Trainer with this callback needs neither",
            type(module).__name__,
        )


def call_to_measure(
    hook: Callable[[L.Trainer, L.LightningModule], None], trainer: L.Trainer, module: L.LightningModule
) -> None:
    """Call a hook of the user with the module in evaluation mode and without gradients."""
    with evaluation_mode(module), torch.no_grad():
        hook(trainer, module)
