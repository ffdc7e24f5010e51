"""Hooks of a recovery. `recovery/run.py` does the work.

| hook                       | action                                                                            |
|----------------------------|-----------------------------------------------------------------------------------|
| configure_optimizers       | return the optimizer of the recovery, once the factors are trained                |
| training_step              | replace the loss or add a term to it, if the recovery distills                    |
| on_before_optimizer_step   | copy weights with finite loss and gradients, restore the last copy otherwise      |
| on_train_batch_end         | judge the state, set the number of steps, start the next stage, log divergence    |
| on_train_end               | return to the best state on the held-out batches                                  |
| on_fit_end                 | merge adapters, restore `requires_grad` flags                                     |
"""

import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import lightning as L
from torch import Tensor, nn

from zssvd_lightning._contexts import overridden
from zssvd_lightning.callbacks.batch_meaning import BatchMeaning
from zssvd_lightning.callbacks.fit_context import FitContext
from zssvd_lightning.callbacks.lifecycle import Lifecycle
from zssvd_lightning.callbacks.trainer import telemetry
from zssvd_lightning.callbacks.trainer.guards import refuse_stale_groups
from zssvd_lightning.callbacks.trainer.judging import Judging
from zssvd_lightning.callbacks.trainer.limits import end_is_unknown, scheduled_steps
from zssvd_lightning.callbacks.trainer.loss_wrapper import changed_loss
from zssvd_lightning.callbacks.trainer.precision import loss_scale, scales
from zssvd_lightning.compression.engine import Compression
from zssvd_lightning.compression.phase import Phase, phase_is_after
from zssvd_lightning.config.compression import CompressionConfig
from zssvd_lightning.errors import ConfigError, DivergedError, TeacherError
from zssvd_lightning.layers.registry import Factored, possible_forms
from zssvd_lightning.model import adapters
from zssvd_lightning.model.dense_copy import COMPILED
from zssvd_lightning.recovery.dressing import refuse_recovery
from zssvd_lightning.recovery.run import RecoveryRun
from zssvd_lightning.recovery.settings import Recovery

logger = logging.getLogger(__name__)


class RecoveryHooks:
    """Part of the callback that trains the factors, if a recovery is set.

    Args:
        fit: context of the run.
        meaning: the callback, which interprets batches and knows the model whose logits the loss uses.
        held_out: batches that compare the states of a recovery; None to keep its last state.
    """

    def __init__(self, fit: FitContext, meaning: BatchMeaning, held_out: Sequence[Any] | None = None) -> None:
        self._fit = fit
        self._meaning = meaning
        self._judging = Judging(fit, meaning, held_out)
        self._dressed_by_load = False
        self._began: float | None = None

    @property
    def is_judged(self) -> bool:
        """True if held-out batches judge the states of the recovery."""
        return self._judging.is_asked

    def setup(self, trainer: L.Trainer, module: L.LightningModule, life: Callable[[], Lifecycle]) -> None:
        """Override optimizers and loss of the module, for the time when the recovery is active."""
        self._dressed_by_load = False
        if self._fit.fitting and (recovery := life().recovery) is not None:
            optimizers = functools.partial(self._optimizers, trainer, module, module.configure_optimizers, life)
            self._fit.borrow(overridden(module, configure_optimizers=optimizers))
            if recovery.settings.distills:
                self._fit.borrow(changed_loss(module, functools.partial(self._loss, life)))

    def teardown(self, module: L.LightningModule, stage: str) -> None:
        """Merge adapters that were added only to load a checkpoint."""
        if stage != "fit" and self._dressed_by_load:
            adapters.merge_adapters(module, self._fit.adapter.replace, self._fit.adapter.whole)
        self._dressed_by_load = False

    def start_batch(self, life: Lifecycle) -> None:
        """Record the start time of the batch during the recovery, and start the clock of one limited in time."""
        self._began = time.perf_counter() if life.phase is Phase.RECOVER else None
        if (recovery := life.active_recovery) is not None and recovery.pace is not None:
            recovery.pace.start()

    def note_loss(self, trainer: L.Trainer, life: Lifecycle, loss: Tensor) -> None:
        """Record that there was a loss. With a loss scale, under which gradients may overflow, also check the loss."""
        if (recovery := life.active_recovery) is not None:
            recovery.rollback.note_loss(finite=not scales(trainer) or bool(loss.isfinite()))

    def check_step(self, trainer: L.Trainer, module: L.LightningModule, life: Lifecycle) -> None:
        """Copy good weights. If the loss or gradients are not finite, restore the last copy and raise DivergedError."""
        if (recovery := life.active_recovery) is not None:
            self._fit.adapter.unwrap_parameters()
            scale = loss_scale(trainer) if scales(trainer) else None
            try:
                recovery.rollback.check_gradients(module, self._fit.adapter.team, scale)
            except DivergedError as error:
                if recovery.judge is None:
                    raise
                logger.warning("training stops, and the best state on the held-out batches is kept: %s", error)
                for parameter in module.parameters():
                    parameter.grad = None
                self._judging.stop(trainer)

    def end_batch(self, trainer: L.Trainer, module: L.LightningModule, life: Lifecycle) -> None:
        """Add up the seconds, log the divergence, and start the next stage when it is due."""
        if self._began is not None and life.report is not None:
            seconds = life.report.seconds
            seconds["recover"] = seconds.get("recover", 0.0) + time.perf_counter() - self._began
        if (recovery := life.active_recovery) is None:
            return
        batches = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        if recovery.divergence is not None and telemetry.is_due(trainer, batches):
            telemetry.log(trainer, self._fit.turn.prefix, distillation=float(recovery.divergence))
        self._judging.end_batch(trainer, module, recovery)
        if recovery.stage_is_over(trainer.global_step, _steps(recovery, trainer)):
            self._fit.adapter.unwrap_parameters()
            if recovery.judge is not None:
                recovery.judge.settle(module, trainer.global_step - recovery.first_step)
            recovery.next_stage(module, self._fit.adapter, trainer.global_step)
            self._fit.adapter.rebuild_optimizers()
            self._fit.adapter.discard_replaced()
            refuse_stale_groups(trainer, module)
            recovery.rollback.keep(module)
            if recovery.judge is not None:
                recovery.judge.go_on_from(module)
            telemetry.log(trainer, self._fit.turn.prefix, recovery_stage=recovery.stage)

    def settle(self, trainer: L.Trainer, module: L.LightningModule, life: Lifecycle) -> None:
        """Return to the best state on the held-out batches, and report it. Do nothing without such batches."""
        if (recovery := life.active_recovery) is not None and recovery.judge is not None:
            self._fit.adapter.unwrap_parameters()
            found = self._judging.settled(trainer, module, recovery.judge, recovery)
            if life.report is not None:
                life.report.held_out = found

    def finish(self, module: L.LightningModule, life: Lifecycle) -> None:
        """End the recovery. The result is a plain low-rank model, unless the settings keep the adapters."""
        self._began = None  # a batch at whose start a later compression takes over is no part of the recovery
        if (recovery := life.active_recovery) is not None:
            self._fit.adapter.unwrap_parameters()
            recovery.rollback.check_weights(module, self._fit.adapter.team)
            recovery.finish(module, self._fit.adapter, merge=recovery.settings.merges)

    def refuse(self, trainer: L.Trainer, module: L.LightningModule, life: Lifecycle) -> None:
        """Raise the errors of a recovery that can be detected before calibration."""
        if (recovery := life.recovery) is not None:
            if end_is_unknown(trainer):
                recovery.settings.refuse_endless()
            student = self._meaning.student(module) if recovery.settings.distills else None
            if student is not None:
                _place_of(student, module)
            kind, targets = life.compression.config.form.layer, life.compression.targets
            classes = {name: possible_forms(kind, *each.shape) for name, each in targets.items()}
            processes = self._fit.adapter.processes_of_a_copy
            forms = _possible_forms(classes, life.compression)
            refuse_recovery(recovery.settings, classes, forms, module, student, processes)
            self._judging.check(trainer, module, recovery)

    def start(self, trainer: L.Trainer, module: L.LightningModule, life: Lifecycle) -> None:
        """Copy and judge the weights that a new recovery starts from, and warn if it trains layers less than asked."""
        if (recovery := life.active_recovery) is not None:
            recovery.rollback.keep(module)
            self._judging.start(trainer, module, recovery)
            if trainer.is_global_zero and (warning := recovery.reduced(module)) is not None:
                logger.warning(warning)

    def take_teacher(self, module: L.LightningModule, life: Lifecycle) -> None:
        """Copy the dense model as teacher, while the original weights are available."""
        recovery = life.recovery
        if recovery is None or not recovery.settings.distills:
            return
        student = self._meaning.student(module)
        place = _place_of(student, module)
        prefix = f"{place}." if place else ""
        originals = life.compression.originals  # which may come from elsewhere, so that one is read at a time
        inside = (
            (name.removeprefix(prefix).replace(COMPILED, ""), originals[name])
            for name in originals
            if name.startswith(prefix)
        )
        recovery.take_teacher(self._fit.adapter, student, inside)

    def resume(self, trainer: L.Trainer, module: L.LightningModule, life: Lifecycle) -> None:
        """Continue from a checkpoint of the recovery."""
        if (recovery := life.active_recovery) is None:
            if life.recovery is not None:
                logger.warning("the recovery is over; configure_optimizers trains the low-rank model from now on")
                life.recovery.over = False
            return
        life.phase = Phase.RECOVER
        recovery.resume(self._fit.adapter, self._meaning.student(module) if recovery.settings.distills else None)
        recovery.rollback.keep(module)
        self.watch(module, life)
        self._judging.start(trainer, module, recovery)

    def prepare(
        self, module: L.LightningModule, life: Lifecycle, state: Mapping[str, Any] | None, *, had_adapters: bool
    ) -> bool:
        """Load the state of a checkpoint of the recovery, once the module has the structure of that checkpoint.

        Returns:
            True if there was such a state.
        """
        self._dressed_by_load = not had_adapters and bool(adapters.on(module))
        recovery = life.recovery
        if not self._fit.fitting or state is None or recovery is None or not phase_is_after(state):
            return False
        recovery.load_state_dict(state["recovery"])
        if (trainer := self._fit.trainer) is not None:
            self._fit.take_up_limits(trainer, state)
        if recovery.active:
            recovery.freeze(module)
        return True

    def leave_after_exception(self, trainer: L.Trainer, module: L.LightningModule, life: Lifecycle) -> None:
        """End the recovery after all callbacks have handled an exception, since they may save a checkpoint."""
        recovery, own = life.active_recovery, trainer.strategy.on_exception
        if recovery is None:
            return

        def leave(exception: BaseException) -> None:
            trainer.strategy.__dict__.pop("on_exception", None)
            own(exception)
            if recovery.judge is not None:
                recovery.judge.settle(module, recovery.judge.steps)
            alone = self._fit.adapter.team.whole_everywhere
            recovery.finish(module, self._fit.adapter, merge=recovery.settings.merges and alone)

        trainer.strategy.__dict__["on_exception"] = leave

    def watch(self, module: L.LightningModule, life: Lifecycle) -> None:
        """Record the forward passes of the model for a recovery that distills, until the end of the run."""
        if (recovery := life.recovery) is not None and recovery.settings.distills:
            self._fit.on_close(recovery.watch(self._meaning.student(module)))

    @staticmethod
    def _optimizers(
        trainer: L.Trainer, module: L.LightningModule, own: Callable[[], Any], life: Callable[[], Lifecycle]
    ) -> Any:
        recovery = life().active_recovery
        if recovery is None or recovery.settings.lr is None:
            return own()
        return recovery.optimizer(module, _steps(recovery, trainer))

    def _loss(self, life: Callable[[], Lifecycle], loss: Tensor, batch: Any) -> Tensor:
        recovery = life().recovery
        return loss if recovery is None else recovery.loss(loss, self._meaning.token_mask(batch))


def _place_of(student: nn.Module, module: nn.Module) -> str:
    places: Iterator[str] = (name for name, part in module.named_modules() if part is student)
    place = next(places, None)
    if place is None:
        raise TeacherError(f"{type(student).__name__}, which student() returns, is no part of the module")
    return place


def _possible_forms(
    classes: Mapping[str, Sequence[type[Factored]]], compression: Compression
) -> dict[str, list[Factored]]:
    """Return layers without values of the rank that a plan gives, or of the ranks that are largest for each matrix.

    The factors, and pivots, are largest at the highest rank k. The coefficients of pivot rows (m - k, k) are at half of
    m, and those of pivot columns (k, n - k) at half of n.
    """
    budget, plan = compression.budget, compression.followed_plan
    found: dict[str, list[Factored]] = {}
    for name, target in compression.targets.items():
        if plan is not None:
            ranks = [plan.ranks[name] or 0]
        else:
            highest = max(budget.highest_rank(name, eight_bit=choice) for choice in budget.bit_choices)
            ranks = [highest, *(min(highest, size // 2) for size in target.shape)]
        found[name] = [form.like(target.module, rank=rank) for form in classes[name] for rank in ranks if rank]
    return found


def _steps(recovery: RecoveryRun, trainer: L.Trainer) -> float:
    """Return the number of optimizer steps of the whole recovery, computed once unless the Trainer's limits change.

    A resumed run does not ask the Trainer again. The Trainer would load the data and lose the position in it.
    """
    limits = (trainer.max_steps, trainer.max_epochs)
    if recovery.steps is not None:
        return recovery.steps
    if recovery.horizon is None or recovery.horizon[1:] != limits:
        recovery.horizon = (scheduled_steps(trainer), *limits)
    return recovery.horizon[0]


def refuse_contradictions(config: CompressionConfig, recovery: Recovery | None, *, plans: bool = False) -> None:
    """Raise ConfigError for settings that do not work in a fit, or a recovery that cannot train the new layers.

    Args:
        config: settings of the compression.
        recovery: training after it, if any.
        plans: whether only the ranks are written.
    """
    if plans:
        config.refuse_plan()
    if config.by_blocks:
        raise ConfigError(
            "memory 'blocks' runs the blocks of a model one by one, which a Trainer does not; set memory to 'whole', "
            "or call compress(model, batches, memory='blocks') before the fit"
        )
    if recovery is None:
        return
    recovery.refuse_storage(config.storage)
    if not recovery.merges and config.form.rounds:
        raise ConfigError(f"storage {config.storage!r} needs merged factors; set recovery.merge to true")
    if recovery.rescales and config.weighs_rows:
        raise ConfigError(
            f"rows_in_16_bits 'loss_aware' goes by the scale of components, which recovery by "
            f"{recovery.method!r} changes; keep the 'last' rows, or recover by 'lora' or 'singular_values'"
        )
