"""Checks that refuse training runs in which a model cannot be compressed."""

import math
from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    GradientAccumulationScheduler,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)

from zssvd_lightning.callbacks.schedule import Schedule
from zssvd_lightning.config.compression import CompressionConfig
from zssvd_lightning.errors import UnsupportedTrainingError
from zssvd_lightning.strategies import StrategyAdapter


def window_end(batches: int, batches_per_epoch: float, accumulate: int) -> int:
    """Return the first batch count >= `batches` with an optimizer step. The last batch of an epoch has one."""
    into_epoch = batches if math.isinf(batches_per_epoch) else batches % int(batches_per_epoch)
    whole = math.ceil(into_epoch / accumulate) * accumulate
    return batches - into_epoch + int(min(whole, batches_per_epoch))


def batches_in(steps: float, batches_per_epoch: float, accumulate: int) -> float:
    """Return the batches in `steps` optimizer steps from the start of an epoch, whose last step may have fewer."""
    if math.isinf(batches_per_epoch) or math.isinf(steps):
        return steps * accumulate
    epochs, rest = divmod(steps, math.ceil(batches_per_epoch / accumulate))
    return epochs * batches_per_epoch + rest * accumulate


def steps_in(batches: float, batches_per_epoch: float, accumulate: int) -> float:
    """Return the optimizer steps in `batches` from the start of an epoch, whose last step may have fewer batches."""
    if math.isinf(batches):
        return batches
    if math.isinf(batches_per_epoch):
        return math.ceil(batches / accumulate)
    epochs, rest = divmod(batches, batches_per_epoch)
    return epochs * math.ceil(batches_per_epoch / accumulate) + math.ceil(rest / accumulate)


def refuse_other_package(trainer: Any) -> None:
    """Raise UnsupportedTrainingError if the Trainer is not the one of `lightning.pytorch`."""
    if not isinstance(trainer, L.Trainer):
        package = type(trainer).__module__.partition(".")[0]
        raise UnsupportedTrainingError(
            f"the Trainer comes from the package {package!r}, whose classes are not those of lightning.pytorch; import "
            "Trainer, LightningModule and callbacks from lightning.pytorch"
        )


def refuse_unsupported(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    """Raise UnsupportedTrainingError if the optimization or another callback does not allow compression."""
    if not pl_module.automatic_optimization:
        raise UnsupportedTrainingError(
            f"{type(pl_module).__name__} optimizes manually, so gradients cannot be taken between backward and step; "
            "set automatic_optimization = True, or call zssvd_lightning.compress on the model"
        )
    if len(trainer.optimizers) != 1:
        raise UnsupportedTrainingError(
            f"{type(pl_module).__name__} has {len(trainer.optimizers)} optimizers, but calibration needs exactly one; "
            "return one from configure_optimizers, or call zssvd_lightning.compress on the model"
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, (StochasticWeightAveraging, WeightAveraging)):
            raise UnsupportedTrainingError(
                f"{type(callback).__name__} averages weights by their names, which change when layers become low-rank; "
                "compress first, and average in a second fit"
            )
        if isinstance(callback, BaseFinetuning):
            raise UnsupportedTrainingError(
                f"{type(callback).__name__} keeps optimizer groups by the names of weights, which change when layers "
                "become low-rank; compress in a second fit"
            )
        if isinstance(callback, ModelPruning):
            raise UnsupportedTrainingError(
                f"{type(callback).__name__} computes weights from masks of their dense shape, and factors have others; "
                "compress first, and prune the factors in a second fit"
            )


def refuse_fit(
    trainer: L.Trainer, pl_module: L.LightningModule, adapter: StrategyAdapter, config: CompressionConfig
) -> None:
    """Raise UnsupportedTrainingError if the fit is of a kind in which the module cannot be compressed. Collective.

    The weights are afterwards as the module has them, not as its strategy lays them out.
    """
    refuse_unsupported(trainer, pl_module)
    adapter.refuse_unsupported()
    adapter.refuse_settings(config)
    adapter.unwrap_parameters()
    refuse_uneven(adapter.team.gathered(trainer.num_training_batches))


def refuse_stale_groups(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    """Check the optimizers of `configure_optimizers`, before compression and again after layers were replaced.

    Raises:
        UnsupportedTrainingError: an optimizer has parameters that are no longer in the model, or a trainable parameter
            is not in exactly one group.
    """
    grouped = [p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
    present = {id(p) for p in pl_module.parameters()}
    if any(id(p) not in present for p in grouped):
        raise UnsupportedTrainingError(
            "configure_optimizers returned parameters that are no longer in the model: it must look them up "
            "(self.parameters()) each time it runs, not keep a list from before"
        )
    counts = {id(p): 0 for p in pl_module.parameters() if p.requires_grad}
    for p in grouped:
        counts[id(p)] = counts.get(id(p), 0) + 1
    named = {id(p): name for name, p in pl_module.named_parameters()}
    if wrong := [named[key] for key, count in counts.items() if count != 1 and key in named]:
        raise UnsupportedTrainingError(
            f"{len(wrong)} trainable parameters are not in exactly one optimizer group "
            f"({', '.join(wrong[:3])}); make configure_optimizers cover them, or freeze them"
        )


def most_accumulated(trainer: L.Trainer) -> int:
    """Return the largest accumulation factor of the run."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    scheduled = [max(c.scheduling.values()) for c in callbacks if isinstance(c, GradientAccumulationScheduler)]
    return max([trainer.accumulate_grad_batches, *scheduled])


def steps_left(trainer: L.Trainer) -> float:
    """Return the number of optimizer steps from now to the end of the fit."""
    epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs - trainer.current_epoch
    steps = math.inf if trainer.max_steps == -1 else trainer.max_steps - trainer.global_step
    per_epoch = trainer.num_training_batches
    return min(steps, steps_in(epochs * per_epoch, per_epoch, most_accumulated(trainer)))


def refuse_uneven(batches: Sequence[float]) -> None:
    """Raise UnsupportedTrainingError if the loaders of the processes have different lengths.

    Args:
        batches: number of batches in an epoch, for every process.
    """
    if len(set(batches)) > 1:
        raise UnsupportedTrainingError(
            f"the training loaders of the processes have {', '.join(f'{count:g}' for count in batches)} batches, so "
            "that some would wait for others; give them equally many, for instance by limit_train_batches"
        )


def refuse_too_short(trainer: L.Trainer, start_epoch: int, start_step: int, batches_needed: int) -> None:
    """Raise UnsupportedTrainingError if the fit ends before the model is factorized.

    Args:
        trainer: the Trainer at the start of training.
        start_epoch: earliest epoch of the compression.
        start_step: earliest global step of the compression.
        batches_needed: number of batches from the start of the compression to factorization.
    """
    accumulate, per_epoch = most_accumulated(trainer), trainer.num_training_batches
    epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs - trainer.current_epoch
    steps = math.inf if trainer.max_steps == -1 else trainer.max_steps - trainer.global_step
    available = min(epochs * per_epoch, batches_in(steps, per_epoch, accumulate))
    whole_epochs = 0 if math.isinf(per_epoch) else (start_epoch - trainer.current_epoch) * per_epoch
    waiting = max(whole_epochs, batches_in(start_step - trainer.global_step, per_epoch, accumulate), 0)
    if waiting + batches_needed > available:
        raise UnsupportedTrainingError(
            f"compression needs {waiting + batches_needed:g} training batches ({waiting:g} until its start, then "
            f"{batches_needed} for calibration and corrections), but this fit has {available:g}; raise max_epochs or "
            "max_steps, or lower calibration_batches, correction_batches, truncations or corrections"
        )


def first_step(trainer: L.Trainer, schedule: Schedule) -> float:
    """Return the global step before which a schedule does not start; infinite if the epochs have no known length."""
    per_epoch = trainer.num_training_batches
    if schedule.start_epoch == 0:
        return schedule.start_step
    return max(schedule.start_step, schedule.start_epoch * steps_in(per_epoch, per_epoch, most_accumulated(trainer)))


def refuse_early_compression(trainer: L.Trainer, schedule: Schedule, begins_at: float, steps: int) -> None:
    """Raise UnsupportedTrainingError if a compression would start before the prehab has taken all its steps.

    Args:
        trainer: the Trainer at the start of training.
        schedule: schedule of the compression.
        begins_at: global step of the first gradient of the prehab.
        steps: number of optimizer steps of the prehab.
    """
    starts_at, ends_at = first_step(trainer, schedule), begins_at + steps
    if starts_at < ends_at:
        raise UnsupportedTrainingError(
            f"ZSSVDCallback would begin at step {starts_at:g} (start_step={schedule.start_step}, "
            f"start_epoch={schedule.start_epoch}), but prehab takes until step {ends_at:g} (second moments until "
            f"{begins_at:g}, then steps={steps}); set start_step={ends_at:g}, or lower steps or moment_batches"
        )
