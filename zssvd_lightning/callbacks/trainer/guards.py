"""Which training runs can be compressed in, and what to do about the others."""

import math
from collections.abc import Sequence

import lightning as L
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
    WeightAveraging,
)

from zssvd_lightning.errors import UnsupportedTrainingError


def window_end(batches: int, batches_per_epoch: float, accumulate: int) -> int:
    """The first batch count from `batches` on at which an optimizer step is taken; an epoch's last batch takes one."""
    into_epoch = batches if math.isinf(batches_per_epoch) else batches % int(batches_per_epoch)
    whole = math.ceil(into_epoch / accumulate) * accumulate
    return batches - into_epoch + int(min(whole, batches_per_epoch))


def _batches(steps: float, batches_per_epoch: float, accumulate: int) -> float:
    """Batches in so many optimizer steps from the start of an epoch; an epoch's last step may take fewer."""
    if math.isinf(batches_per_epoch) or math.isinf(steps):
        return steps * accumulate
    epochs, rest = divmod(steps, math.ceil(batches_per_epoch / accumulate))
    return epochs * batches_per_epoch + rest * accumulate


def steps_in(batches: float, batches_per_epoch: float, accumulate: int) -> float:
    """Optimizer steps in so many batches from the start of an epoch; an epoch's last step may take fewer batches."""
    if math.isinf(batches):
        return batches
    if math.isinf(batches_per_epoch):
        return math.ceil(batches / accumulate)
    epochs, rest = divmod(batches, batches_per_epoch)
    return epochs * math.ceil(batches_per_epoch / accumulate) + math.ceil(rest / accumulate)


def refuse_unsupported(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    """Raises UnsupportedTrainingError for runs, and beside callbacks, that a model cannot be compressed in."""
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


def refuse_stale_groups(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    """Checks what `configure_optimizers` gave, before any work is spent and again after layers were replaced.

    Raises:
        UnsupportedTrainingError: it returned parameters that are gone, or a trainable one is not in exactly one group.
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
    """The largest accumulation factor the run will have."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    scheduled = [max(c.scheduling.values()) for c in callbacks if isinstance(c, GradientAccumulationScheduler)]
    return max([trainer.accumulate_grad_batches, *scheduled])


def refuse_uneven(batches: Sequence[float]) -> None:
    """Raises UnsupportedTrainingError when processes have loaders of different length.

    Args:
        batches: in an epoch, of every process.
    """
    if len(set(batches)) > 1:
        raise UnsupportedTrainingError(
            f"the training loaders of the processes have {', '.join(f'{count:g}' for count in batches)} batches, so "
            "that some would wait for others; give them equally many, for instance by limit_train_batches"
        )


def refuse_too_short(trainer: L.Trainer, start_epoch: int, start_step: int, batches_needed: int) -> None:
    """Raises UnsupportedTrainingError when the fit ends before the model would be factorized.

    Args:
        trainer: at the start of training.
        start_epoch: compression starts no earlier than this epoch.
        start_step: compression starts no earlier than this global step.
        batches_needed: from the start of compression to factorization.
    """
    accumulate, per_epoch = most_accumulated(trainer), trainer.num_training_batches
    epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs - trainer.current_epoch
    steps = math.inf if trainer.max_steps == -1 else trainer.max_steps - trainer.global_step
    available = min(epochs * per_epoch, _batches(steps, per_epoch, accumulate))
    whole_epochs = 0 if math.isinf(per_epoch) else (start_epoch - trainer.current_epoch) * per_epoch
    waiting = max(whole_epochs, _batches(start_step - trainer.global_step, per_epoch, accumulate), 0)
    if waiting + batches_needed > available:
        raise UnsupportedTrainingError(
            f"compression needs {waiting + batches_needed:g} training batches ({waiting:g} until its start, then "
            f"{batches_needed} for calibration and corrections), but this fit has {available:g}; raise max_epochs or "
            "max_steps, or lower calibration_batches, correction_batches, truncations or corrections"
        )


def refuse_early_compression(
    trainer: L.Trainer, start_epoch: int, start_step: int, begins_at: float, steps: int
) -> None:
    """Raises UnsupportedTrainingError when a compression would begin before a prehab has had its steps.

    Args:
        trainer: at the start of training.
        start_epoch: compression starts no earlier than this epoch.
        start_step: compression starts no earlier than this global step.
        begins_at: the global step of prehab's first gradient.
        steps: how many it takes.
    """
    accumulate, per_epoch = most_accumulated(trainer), trainer.num_training_batches
    of_epochs = start_epoch * steps_in(per_epoch, per_epoch, accumulate) if start_epoch else 0
    starts_at, ends_at = max(start_step, of_epochs), begins_at + steps
    if starts_at < ends_at:
        raise UnsupportedTrainingError(
            f"ZSSVDCallback would begin at step {starts_at:g} (start_step={start_step}, start_epoch={start_epoch}), "
            f"but prehab takes until step {ends_at:g} (second moments until {begins_at:g}, then steps={steps}); set "
            f"start_step={ends_at:g}, or lower steps or moment_batches"
        )
