"""When things happen in a recovery. What happens is in `recovering.py`.

| hook                       | what is done there                                                                |
|----------------------------|-----------------------------------------------------------------------------------|
| configure_optimizers       | answered for the module, once its factors are trained                             |
| training_step              | its loss is replaced, or added to, where the recovery distills                     |
| on_before_optimizer_step   | weights whose loss and gradients are finite are kept, others given up             |
| on_train_batch_end         | the next stage begins; how far the model is from its teacher is logged            |
| on_fit_end                 | adapters are merged, and flags are what they were                                 |
"""

import functools
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn

from zssvd_lightning._contexts import overridden
from zssvd_lightning.calibration.batches import token_mask
from zssvd_lightning.callbacks import telemetry
from zssvd_lightning.callbacks.fit_context import ResumableCallback
from zssvd_lightning.callbacks.guards import refuse_stale_groups
from zssvd_lightning.callbacks.limits import scheduled_steps
from zssvd_lightning.callbacks.loss_wrapper import changed_loss
from zssvd_lightning.callbacks.precision import loss_scale, scales
from zssvd_lightning.compression.phase import Phase, phase_is_after
from zssvd_lightning.errors import TeacherError
from zssvd_lightning.model import adapters
from zssvd_lightning.model.dense_copy import COMPILED
from zssvd_lightning.model.logits import model_with_logits
from zssvd_lightning.recovery.run import RecoveryRun

logger = logging.getLogger(__name__)


class RecoveryHooks(ResumableCallback):
    """The part of the callback that trains the factors, where it is told how."""

    _dressed_by_load = False
    _began: float | None = None

    @property
    def _recovery_run(self) -> RecoveryRun | None:
        """The recovery under way."""
        recovery = self._lifecycle.recovery
        return recovery if recovery is not None and recovery.active else None

    def token_mask(self, batch: Any) -> Tensor | None:
        """Which positions (B, T) of a batch are not padding. Override for batches without an `attention_mask`."""
        return token_mask(batch)

    def student(self, pl_module: L.LightningModule) -> nn.Module:
        """The model with the logits that the loss is of. Override where it is not one of transformers."""
        return model_with_logits(pl_module)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Has the module train by the recovery, once there is one."""
        super().setup(trainer, pl_module, stage)
        self._dressed_by_load = False
        if stage == "fit" and (recovery := self._lifecycle.recovery) is not None:
            optimizers = functools.partial(self._optimizers, trainer, pl_module, pl_module.configure_optimizers)
            self._borrowed.enter_context(overridden(pl_module, configure_optimizers=optimizers))
            if recovery.settings.distills:
                self._borrowed.enter_context(changed_loss(pl_module, self._loss))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Merges adapters that only a checkpoint has put on."""
        if stage != "fit" and self._dressed_by_load:
            adapters.merge_adapters(pl_module, self.adapter.replace, self.adapter.whole)
        self._dressed_by_load = False
        super().teardown(trainer, pl_module, stage)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Notes the time."""
        self._began = time.perf_counter() if self.phase is Phase.RECOVER else None

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Notes that there was a loss, and whether it is finite, where gradients need not be."""
        if (recovery := self._recovery_run) is not None:
            recovery.rollback.note_loss(finite=not scales(trainer) or bool(loss.isfinite()))

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Keeps weights that are good, or brings them back. Raises DivergedError then."""
        if self._recovery_run is not None:
            self.adapter.unwrap_parameters()
            scale = loss_scale(trainer) if scales(trainer) else None
            self._recovery_run.rollback.check_gradients(pl_module, self.adapter.team, scale)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Begins the next stage of the recovery when it is due."""
        if self._began is not None and self.report is not None:
            seconds = self.report.seconds
            seconds["recover"] = seconds.get("recover", 0.0) + time.perf_counter() - self._began
        if (recovery := self._recovery_run) is None:
            return
        batches = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        if recovery.divergence is not None and batches % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            telemetry.log(trainer, distillation=float(recovery.divergence))
        if recovery.stage_is_over(trainer.global_step, _steps(recovery, trainer)):
            self.adapter.unwrap_parameters()
            recovery.next_stage(pl_module, self.adapter, trainer.global_step)
            self.adapter.rebuild_optimizers()
            self.adapter.discard_replaced()
            refuse_stale_groups(trainer, pl_module)
            recovery.rollback.keep(pl_module)
            telemetry.log(trainer, recovery_stage=recovery.stage)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leaves a plain low-rank model, unless adapters are to stay."""
        if (recovery := self._recovery_run) is not None:
            self.adapter.unwrap_parameters()
            recovery.rollback.check_weights(pl_module, self.adapter.team)
            recovery.finish(pl_module, self.adapter, merge=recovery.settings.merges)

    def _refuse_recovery(self, pl_module: L.LightningModule) -> None:
        """Raises what can be told of a recovery before calibration is spent."""
        if (recovery := self._lifecycle.recovery) is not None:
            student = self.student(pl_module) if recovery.settings.distills else None
            targets = list(self._lifecycle.compression.targets)
            recovery.refuse(targets, pl_module, student, self.adapter.processes_of_a_copy)
            self._watch(pl_module)

    def _take_teacher(self, pl_module: L.LightningModule) -> None:
        """Keeps the dense model, while its weights are at hand."""
        recovery = self._lifecycle.recovery
        if recovery is None or not recovery.settings.distills:
            return
        student = self.student(pl_module)
        place = next((name for name, part in pl_module.named_modules() if part is student), None)
        if place is None:
            raise TeacherError(f"{type(student).__name__}, which student() returns, is no part of the module")
        prefix = f"{place}." if place else ""
        originals = self._lifecycle.compression.originals
        inside = {name.removeprefix(prefix): W for name, W in originals.items() if name.startswith(prefix)}
        inside = {name.replace(COMPILED, ""): W for name, W in inside.items()}
        recovery.take_teacher(self.adapter, student, inside)

    def _go_on_recovering(self, pl_module: L.LightningModule) -> None:
        """Goes on from a checkpoint of the recovery."""
        if (recovery := self._recovery_run) is None:
            if self._lifecycle.recovery is not None:
                logger.warning("the recovery is over; configure_optimizers trains the low-rank model from now on")
                self._lifecycle.recovery.over = False
            return
        self._lifecycle.phase = Phase.RECOVER
        recovery.resume(self.adapter, self.student(pl_module) if recovery.settings.distills else None)
        recovery.rollback.keep(pl_module)
        self._watch(pl_module)

    def _watch(self, pl_module: L.LightningModule) -> None:
        if (recovery := self._lifecycle.recovery) is not None and recovery.settings.distills:
            self._borrowed.callback(recovery.watch(self.student(pl_module)))

    def _prepared(self, pl_module: L.LightningModule, checkpoint: Mapping[str, Any], had_adapters: bool) -> None:
        self._dressed_by_load = not had_adapters and bool(adapters.on(pl_module))
        state, recovery = checkpoint.get("callbacks", {}).get(self.state_key), self._lifecycle.recovery
        if self._fitting and state is not None and recovery is not None and phase_is_after(state):
            self.recovers_from = state["recovers_from"]
            recovery.load_state_dict(state["recovery"])
            if self._trainer is not None and (trainer := self._trainer()) is not None:
                self._take_up_allowance(trainer, state)
            if recovery.active:
                recovery.freeze(pl_module)

    def _leave_after(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leaves a plain low-rank model once all callbacks have dealt with an exception, and may have saved it."""
        recovery, own = self._recovery_run, trainer.strategy.on_exception
        if recovery is None:
            return

        def leave(exception: BaseException) -> None:
            trainer.strategy.__dict__.pop("on_exception", None)
            own(exception)
            alone = self.adapter.team.whole_everywhere
            recovery.finish(pl_module, self.adapter, merge=recovery.settings.merges and alone)

        trainer.strategy.__dict__["on_exception"] = leave

    def _optimizers(self, trainer: L.Trainer, pl_module: L.LightningModule, own: Callable[[], Any]) -> Any:
        recovery = self._recovery_run
        if recovery is None or recovery.settings.lr is None:
            return own()
        return recovery.optimizer(pl_module, _steps(recovery, trainer))

    def _loss(self, loss: Tensor, batch: Any) -> Tensor:
        recovery = self._lifecycle.recovery
        return loss if recovery is None else recovery.loss(loss, self.token_mask(batch))


def _steps(recovery: RecoveryRun, trainer: L.Trainer) -> float:
    """Optimizer steps of the whole recovery, as they were found to be when it began, unless limits have changed.

    A resumed run does not ask the Trainer, which would load the data for it and forget how far they were gone through.
    """
    limits = (trainer.max_steps, trainer.max_epochs)
    if recovery.horizon is None or recovery.horizon[1:] != limits:
        recovery.horizon = (scheduled_steps(trainer), *limits)
    return recovery.horizon[0]
