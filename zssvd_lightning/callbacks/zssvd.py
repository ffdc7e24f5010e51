"""When things happen inside a training run. What happens is in `compression.py`, how far it has come in `lifecycle.py`.

| hook                     | what is done there                                                               |
|--------------------------|----------------------------------------------------------------------------------|
| setup, teardown          | the module's checkpoint hooks and the progress bar are borrowed, and given back  |
| on_train_start           | is the run of a kind that can be compressed, and long enough?                    |
| on_train_batch_start     | the set point is looked for; a calibration batch comes under observation         |
| on_before_backward       | its loss is checked, and its gradient weighted by the terms the loss averages    |
| on_before_optimizer_step | gradients are taken away, so the user's optimizer has nothing to step on         |
| on_train_batch_end       | observation ends; when enough was seen, the next phase is entered                |
| on_train_epoch_end       | the same, for loaders that do not tell their length                              |
| on_exception             | everything is put back, unless the model was factorized already                  |
"""

import logging
import math
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self, Unpack

import lightning as L
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from zssvd_lightning.calibration.batches import loss_terms
from zssvd_lightning.callbacks import telemetry
from zssvd_lightning.callbacks.guards import (
    most_accumulated,
    refuse_stale_groups,
    refuse_too_short,
    refuse_uneven,
    refuse_unsupported,
)
from zssvd_lightning.callbacks.lifecycle import Lifecycle
from zssvd_lightning.callbacks.limits import stopping_now
from zssvd_lightning.callbacks.other_callbacks import hold_early_stopping, start_ranking_afresh
from zssvd_lightning.callbacks.precision import ScalerAtRest, loss_scale, nothing_to_clip, scales, unscale
from zssvd_lightning.callbacks.recovery import RecoveryHooks
from zssvd_lightning.callbacks.schedule import CallbackSettings, Schedule, schedule_of
from zssvd_lightning.compression.phase import Phase
from zssvd_lightning.compression.quantization import in_8_bits_already, quantize_layers
from zssvd_lightning.config.compression import CompressionConfig
from zssvd_lightning.errors import CalibrationError, CheckpointError, ConfigError, UnfinishedError
from zssvd_lightning.layers.int8 import EightBitLinear
from zssvd_lightning.layers.storage import EIGHT_BIT
from zssvd_lightning.recovery.methods import recovery_of
from zssvd_lightning.recovery.settings import Recovery
from zssvd_lightning.selection.plan import check_plan_output
from zssvd_lightning.serialization.checkpoint_mixin import LowRankCheckpointMixin

logger = logging.getLogger(__name__)


PLAN_FILE = "zssvd_plan.yaml"


class ZSSVDCallback(RecoveryHooks):
    """Compresses the model in the middle of `trainer.fit` by Zero Sum SVD (arXiv 2602.02848).

    Works on any `LightningModule` with automatic optimization and one optimizer whose `training_step` returns a loss
    that is a mean. During calibration dropout is off, no weight changes and the optimizer keeps its state, but the
    batches count as steps for `max_steps` and schedulers. After factorization `configure_optimizers` runs again, or
    with `recovery` its optimizer is set up, so the learning-rate schedule starts with the training of the factors.
    Checkpoints can be resumed from at any point.

    Args:
        prune_ratio: fraction of the target layers' parameters to remove, in (0, 1).
        preset: method by name, such as `best`, `zs-svd` or `svd-llm` (see `config/presets/`). The defaults of
            `CompressionConfig` when None, which are the preset `zs-svd-line-search`.
        schedule: when the compression takes place: a `Schedule` or a mapping of its fields.
        recovery: how the factors are trained, such as `LoRARecovery(rank=8, lr=1e-3)`, or a mapping of its `method`
            (`lora`, `factors` or `singular_values`) and fields; by the optimizer of the module when None.
        dry_run: only calibrate, write the ranks that would be chosen to this file, put everything back and stop. True
            writes `zssvd_plan.yaml` in the folder of the logger.
        progress: draw a progress bar while spectra are computed.
        compression: settings of `CompressionConfig`, such as `metric="two_sided"`; they win over the preset.

    Attributes:
        phase: where the compression stands, a `Phase`.
        report: what was done, from FACTORIZE on; None before.
        recovers_from: the global step of this fit at which the factors began to train; None before.

    Raises:
        ConfigError: an argument is out of range.
        UnsupportedTrainingError: at the start of `fit`, when it is of a kind that cannot be compressed in or is too
            short.
        TargetError: at the start of `fit`, when there is nothing to compress.
        PlanError: at the start of `fit`, when the plan cannot be read or is of another model.
        OutputError: at the start of `fit`, when a dry run would overwrite a file.
        CheckpointError: at the start of `fit`, `validate`, `test` or `predict`, when the checkpoint is of another
            model, or of a compression with other settings. The model is then as it was.
        LogitsError: at the start of `fit`, when drawn output sides, refits or distillation need the one model whose
            logits the loss is of, and it is not known; override `student`.
        RecoveryError: at the start of `fit` or at factorization, when nothing can be trained as `recovery` says, and
            TeacherError, when there is nothing to distill from. The model is then put back.
        DivergedError: during the recovery, when a loss or gradient is not finite; the low-rank model has its last
            good weights.
        CalibrationError: during `fit`, when batches do not give the statistics needed. The model is then put back.
        UnfinishedError: at the end of `fit`, when training stopped before the model was factorized.

    Example:
        >>> trainer = L.Trainer(max_epochs=3, callbacks=[ZSSVDCallback(prune_ratio=0.4)])  # doctest: +SKIP
    """

    def __init__(
        self,
        prune_ratio: float = 0.2,
        preset: str | None = None,
        *,
        schedule: Schedule | dict[str, Any] = Schedule(),
        recovery: Recovery | dict[str, Any] | None = None,
        dry_run: bool | str | Path = False,
        progress: bool = True,
        **compression: Unpack[CallbackSettings],
    ) -> None:
        settings: dict[str, Any] = dict(compression)
        self.schedule = schedule_of(schedule).with_flat(settings)
        self._plan_output = None if isinstance(dry_run, bool) else Path(dry_run)
        self.dry_run = dry_run is not False
        if dry_run is True and settings.get("plan") is not None:
            self._plan_output = Path(settings.pop("plan"))
            warnings.warn(
                "dry_run=True with plan=FILE is now dry_run=FILE; plan is a file to follow",
                DeprecationWarning,
                stacklevel=2,
            )
        self.config = CompressionConfig.of(preset, prune_ratio=prune_ratio, **settings)
        self.recovery = recovery_of(recovery)
        if self.recovery is not None:
            self.recovery.refuse_storage(self.config.storage)
        if self.recovery is not None and not self.recovery.merges and self.config.storage in EIGHT_BIT:
            raise ConfigError(f"storage {self.config.storage!r} needs merged factors; set recovery.merge to true")
        if self.recovery is not None and self.recovery.rescales and self.config.weighs_rows:
            raise ConfigError(
                f"rows_in_16_bits 'loss_aware' goes by the scale of components, which recovery by "
                f"{self.recovery.method!r} changes; keep the 'last' rows, or recover by 'lora' or 'singular_values'"
            )
        self.progress = progress
        self._planned = False
        super().__init__(self._new_lifecycle, self.schedule.extend_training)

    @classmethod
    def from_config(
        cls,
        config: CompressionConfig,
        *,
        schedule: Schedule | dict[str, Any] = Schedule(),
        recovery: Recovery | dict[str, Any] | None = None,
        dry_run: bool | str | Path = False,
        progress: bool = True,
    ) -> Self:
        """Return the callback of a `CompressionConfig`, as recipes have one; the rest is as for the class."""
        return cls(**asdict(config), schedule=schedule, recovery=recovery, dry_run=dry_run, progress=progress)

    def loss_terms(self, batch: Any) -> float:
        """How many terms the mean loss of a batch runs over. Override for batches without `labels`."""
        return loss_terms(batch)

    def batches_needed(self, batches_per_epoch: float = math.inf, accumulate: int = 1) -> int:
        """Training batches from the start of an epoch until the model is factorized."""
        return self._begin().batches_needed(batches_per_epoch, accumulate, first_only=self.dry_run)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Has the module's structure follow its checkpoints, and the progress bar show the phase."""
        super().setup(trainer, pl_module, stage)
        self._planned = False
        if stage == "fit":
            self._borrowed.enter_context(telemetry.shown_on_bar(trainer, lambda: self._describe(trainer)))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Gives back what `setup` borrowed. Raises UnfinishedError when a fit ended without a batch of its own."""
        super().teardown(trainer, pl_module, stage)
        if self._lifecycle.gathering and stage == "fit":
            self._give_up(pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuses runs that cannot be compressed in, before any batch is spent; goes on from a checkpoint."""
        if self.phase in (Phase.RECOVER, Phase.DONE):
            if self._has_compressed(pl_module):
                if in_8_bits_already(pl_module):
                    logger.warning("the layers are in 8 bits already; only what is beside their codes will be trained")
                self._compressed = weakref.ref(pl_module)
                self._go_on_recovering(pl_module)
                return
            self._start_over()
        refuse_unsupported(trainer, pl_module)
        self.adapter.refuse_unsupported()
        self.adapter.refuse_settings(self.config)
        self.adapter.unwrap_parameters()
        refuse_uneven(self.adapter.team.gathered(trainer.num_training_batches))
        plan_path = self._plan_path(trainer) if self.dry_run else None
        with self.adapter.team.together():
            refuse_stale_groups(trainer, pl_module)
            if plan_path is not None and trainer.is_global_zero:
                check_plan_output(plan_path)
            if self.phase is Phase.WAIT:
                self._lifecycle.epoch_length = math.inf
                needed = self.batches_needed(trainer.num_training_batches, most_accumulated(trainer))
                needed = 1 if self.extend_training else needed
                refuse_too_short(
                    trainer, self.schedule.start_epoch, self.schedule.start_step, needed + (self.recovery is not None)
                )
            if self.config.asks_model:
                self.student(pl_module)
            self._lifecycle.attach(pl_module, self.progress, self.adapter)
            self._refuse_recovery(pl_module)
        gathering = self._lifecycle.compression.gathering
        gathering.can_overflow, gathering.logits_model = scales(trainer), self.student
        telemetry.log_phase(trainer, self.phase)
        self._go_on_if_enough(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Puts the batch under observation, once the set point is reached and until enough was seen."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        started = trainer.current_epoch >= self.schedule.start_epoch and trainer.global_step >= self.schedule.start_step
        if self.phase is Phase.WAIT and started and not self._planned:
            self._lifecycle.start()
            telemetry.log_phase(trainer, self.phase)
        if self._lifecycle.gathering:
            self.adapter.unwrap_parameters()
            self.adapter.before_batch()
            observed = self._lifecycle.open(self.token_mask(batch), self.loss_terms(batch))
            self.adapter.sync_requires_grad()
            observed.during(nothing_to_clip(pl_module))
            self._scaler = observed.during(ScalerAtRest(trainer).resting())

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Notes the loss and turns its gradient from a mean into a sum over its terms.

        Lightning has divided the loss by the accumulation factor and, in fp16, multiplied it by the loss scale; the
        weights keep the scale and are relative to the first batch's terms, so that no gradient overflows.
        """
        super().on_before_backward(trainer, pl_module, loss)
        life, accumulate = self._lifecycle, trainer.accumulate_grad_batches
        if life.first_losses is not None:
            life.first_losses.append(float(loss.detach()) * accumulate / loss_scale(trainer))
        if life.batch is None or life.reference_terms is None:
            return
        life.batch.observation.forward_done()
        scale = loss_scale(trainer)
        mean = loss * (accumulate / scale)
        life.compression.gathering.add_loss(mean, life.batch.terms, life.reference_terms / scale)
        weight = life.batch.terms * accumulate / life.reference_terms
        if weight != 1.0:
            loss.register_hook(lambda gradient: gradient * weight)  # type: ignore[no-untyped-call]

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The batch has given all it has."""
        if self._lifecycle.batch is not None:
            self._lifecycle.batch.complete = True

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Takes the gradients of the accumulation window, before clipping, and leaves the optimizer none."""
        life = self._lifecycle
        if life.first_losses:
            losses = math.fsum(life.first_losses) / len(life.first_losses)
            everywhere = self.adapter.team.gathered(losses)
            telemetry.log(trainer, loss_after_truncation=math.fsum(everywhere) / len(everywhere))
            life.first_losses = None
        if life.batch is not None:
            self._collect(trainer, optimizer)
            optimizer.zero_grad(set_to_none=True)
            life.batch.stepped = True
        super().on_before_optimizer_step(trainer, pl_module, optimizer)

    def on_before_zero_grad(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Takes gradients that would go without a step, as where `optimizer_step` is overridden to leave some out."""
        if self._lifecycle.gathering and self._lifecycle.compression.gathering.pending:
            self._collect(trainer, None)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Ends the observation and, when enough was seen and the accumulation window is closed, goes on."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._lifecycle.batches_into_epoch = batch_idx + 1
        if (observed := self._lifecycle.batch) is None:
            return
        self._lifecycle.close()
        if not observed.complete:
            raise CalibrationError(
                f"training_step gave no loss for calibration batch {batch_idx} of epoch {trainer.current_epoch}; "
                "calibrate on batches that give one"
            )
        hold_early_stopping(trainer)
        if self.extend_training:
            self._limits.add(trainer, observed.stepped, self._batches_per_epoch(trainer))
        to_gather = self._lifecycle.limit(self.phase, self._batches_per_epoch(trainer))
        telemetry.log_progress(trainer, self._lifecycle.batches, to_gather)
        self._go_on_if_enough(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes how long an epoch is, which a loader without a length does not tell before, and goes on if enough."""
        self._lifecycle.close()
        self._lifecycle.epoch_length = self._lifecycle.batches_into_epoch
        if self.extend_training:
            self._limits.recount(trainer, self._batches_per_epoch(trainer))
        self._go_on_if_enough(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Declares the work done. Raises UnfinishedError, with the model put back, when it is not."""
        if self.phase is Phase.RECOVER:
            self._lifecycle.phase = Phase.DONE
            telemetry.log_phase(trainer, self.phase)
        elif self.phase is not Phase.DONE and not self._planned:
            self._give_up(pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Puts the trained factors into 8 bits, if the storage is to have them; checkpoints of the fit are not."""
        super().on_fit_end(trainer, pl_module)
        if self.phase is Phase.DONE and self.report is not None and self.config.storage in EIGHT_BIT:
            layers = [
                name
                for name, layer in self.report.layers.items()
                if layer.in_8_bits and not isinstance(pl_module.get_submodule(name), EightBitLinear)
            ]
            quantize_layers(pl_module, layers, self.config.storage, self._lifecycle.importances)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Puts everything back, unless the model was factorized already."""
        if self._lifecycle.gathering:
            for parameter in pl_module.parameters():
                parameter.grad = None
        if self.phase not in (Phase.RECOVER, Phase.DONE):
            self._abandon(pl_module)
        self._leave_after(trainer, pl_module)
        self.teardown(trainer, pl_module, "fit" if self._fitting else str(trainer.state.fn))

    def refuse_state(self, state: Mapping[str, Any]) -> None:
        """Raises CheckpointError for a callback state that this fit cannot go on from."""
        super().refuse_state(state)
        is_dense = self._lifecycle.is_dense_at(state["position"])
        if self.dry_run and (not is_dense or state["phase"] in (Phase.RECOVER, Phase.DONE)):
            raise CheckpointError(
                "a dry run starts from a dense model, but this checkpoint is of a truncated one; resume "
                "from one of before the compression, or without dry_run"
            )

    def _give_up(self, pl_module: L.LightningModule) -> None:
        phase, seen = self.phase, self._lifecycle.batches
        self._abandon(pl_module)
        raise UnfinishedError(
            f"training ended in phase '{phase}' after {seen} of its batches, before the model was factorized, and "
            "the model was put back; train longer, start earlier, or lower calibration_batches, truncations or "
            "corrections"
        )

    def _collect(self, trainer: L.Trainer, optimizer: torch.optim.Optimizer | None) -> None:
        """Takes the gradients there are, before a step of `optimizer` if Lightning is about to take one."""
        compression, unit = self._lifecycle.compression, self._lifecycle.reference_terms
        self.adapter.unwrap_parameters()
        finite = unscale(trainer, optimizer, compression.targets.values())
        if scales(trainer):
            finite = all(compression.team.gathered(finite))
        if unit is not None and finite:
            compression.gathering.collect_gradients(unit)
            return
        logger.warning("gradients overflowed in float16; their batches are not counted and the loss scale drops")
        compression.gathering.discard_gradients()
        self._scaler.overflowed = True

    def _new_lifecycle(self) -> Lifecycle:
        return Lifecycle(
            self.config, self.schedule.calibration_batches, self.schedule.calibration_epochs, self.recovery
        )

    def _batches_per_epoch(self, trainer: L.Trainer) -> float:
        return min(trainer.num_training_batches, self._lifecycle.epoch_length)

    def _describe(self, trainer: L.Trainer) -> str:
        life = self._lifecycle
        if not life.gathering:
            return life.phase.value
        return f"{life.phase} {life.batches}/{life.limit(life.phase, self._batches_per_epoch(trainer))}"

    def _plan_path(self, trainer: L.Trainer) -> Path:
        return Path(self._plan_output or Path(trainer.log_dir or trainer.default_root_dir) / PLAN_FILE)

    def _go_on_if_enough(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leaves CALIBRATE or CORRECT for what comes next, when it has its batches."""
        life = self._lifecycle
        if not life.enough(trainer.num_training_batches):
            return
        self.adapter.unwrap_parameters()
        if self.dry_run and life.stage.truncates:
            self._write_plan(trainer, pl_module)
            return
        was_dense = life.is_dense
        with life.changing_weights():
            telemetry.log_stage(trainer, life.advance(), life.compression)
            if was_dense:
                start_ranking_afresh(trainer, "dense")
            if life.phase is Phase.FACTORIZE:
                self._factorize(trainer, pl_module)
        telemetry.log_phase(trainer, life.phase)

    def _write_plan(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        path, plan = self._plan_path(trainer), self._lifecycle.compression.plan()
        with self.adapter.team.together():
            if trainer.is_global_zero:
                plan.write(path)
        self._abandon(pl_module)
        self._planned = True
        self._borrowed.enter_context(stopping_now(trainer))
        logger.info("dry run: the ranks are in %s; compress with plan=%s", path, path)

    def _factorize(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        def set_up_optimizers() -> None:
            self.adapter.rebuild_optimizers()
            refuse_stale_groups(trainer, pl_module)

        self.recovers_from = trainer.global_step
        self._take_teacher(pl_module)
        self._lifecycle.factorize(trainer.global_step, set_up_optimizers)
        self.adapter.discard_replaced()
        if self._recovery_run is not None:
            self._recovery_run.rollback.keep(pl_module)
        start_ranking_afresh(trainer, "truncated")
        self._compressed = weakref.ref(pl_module)
        if not isinstance(pl_module, LowRankCheckpointMixin):
            logger.info(
                "%s.load_from_checkpoint takes LowRankCheckpointMixin as a base class from now on; a Trainer with "
                "this callback loads its checkpoints without",
                type(pl_module).__name__,
            )
