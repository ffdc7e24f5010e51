"""Compression inside one fit, as driven by the hooks of the callback."""

import math
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L

from zssvd_lightning.callbacks.announcements import announce, call_to_measure, conclude
from zssvd_lightning.callbacks.batch_meaning import BatchMeaning
from zssvd_lightning.callbacks.callback_state import RUN, refuse_damaged, refuse_rounded
from zssvd_lightning.callbacks.fit_context import FitContext
from zssvd_lightning.callbacks.lifecycle import Lifecycle
from zssvd_lightning.callbacks.observed_batch import refuse_none
from zssvd_lightning.callbacks.recovery import RecoveryHooks
from zssvd_lightning.callbacks.schedule import Schedule
from zssvd_lightning.callbacks.several.ratios import compare_ratios
from zssvd_lightning.callbacks.trainer import telemetry
from zssvd_lightning.callbacks.trainer.bar import shown_on_bar
from zssvd_lightning.callbacks.trainer.guards import most_accumulated, refuse_fit, refuse_stale_groups, refuse_too_short
from zssvd_lightning.callbacks.trainer.limits import ExtendedLimits, stopping_now, trains_on
from zssvd_lightning.callbacks.trainer.other_callbacks import (
    expect_own_metrics,
    hold_early_stopping,
    start_ranking_afresh,
)
from zssvd_lightning.callbacks.trainer.precision import refuse_limits, scales
from zssvd_lightning.callbacks.trainer.recompression import has_reported_ranks, is_outdated
from zssvd_lightning.callbacks.trainer.replay import Replay
from zssvd_lightning.callbacks.trainer.trial_runs import Asked, DryRun
from zssvd_lightning.compression.memory.extent import Beside
from zssvd_lightning.compression.phase import Phase
from zssvd_lightning.compression.quantization import quantize_layers
from zssvd_lightning.compression.safeguard import Safeguard
from zssvd_lightning.config.compression import CompressionConfig
from zssvd_lightning.errors import UnfinishedError
from zssvd_lightning.layers.int8 import EightBitLinear
from zssvd_lightning.offload.parking import Parking
from zssvd_lightning.recovery.settings import Recovery
from zssvd_lightning.selection.plan import check_plan_output


class CompressionRun:
    """One compression in the hooks of a fit, from its scheduled start to factorization.

    Args:
        fit: context of the run.
        meaning: the callback, which interprets batches.
        recovering: hooks that train the factors afterwards.
        config: settings of the compression.
        schedule: start and length of the compression.
        recovery: settings of the recovery; None for the optimizer of the module.
        dry_run: only write the plan, to this file. True for `zssvd_plan.yaml` in the folder of the logger.
        progress: draw progress bars.

    Attributes:
        life: lifecycle of the compression.
        recovers_from: global step of this fit at which training of the factors started; None before.
    """

    def __init__(
        self,
        fit: FitContext,
        meaning: BatchMeaning,
        recovering: RecoveryHooks,
        config: CompressionConfig,
        schedule: Schedule,
        recovery: Recovery | None,
        dry_run: bool | Path,
        progress: bool,
    ) -> None:
        self.recovers_from: int | None = None
        self._fit, self._meaning, self._recovering = fit, meaning, recovering
        self._asked, self._recovery = Asked(config, schedule), recovery
        self._config, self._schedule = self._asked
        self._dry_run, self._progress = DryRun(dry_run), progress
        self._compressed: weakref.ref[L.LightningModule] | None = None
        self._parking = Parking()
        self.life = self.fresh()

    def fresh(self, asked: Asked | None = None) -> Lifecycle:
        """Return the lifecycle of a compression that has not started, with the settings of this fit or other ones."""
        config, schedule = asked or (self._config, self._schedule)
        return Lifecycle(config, schedule.calibration_batches, schedule.calibration_epochs, self._recovery)

    def batches_needed(self, batches_per_epoch: float, accumulate: int, start: int = 0) -> int:
        """Return the number of training batches from batch `start` until factorization or the written plan."""
        return self.fresh(self._asked).batches_needed(batches_per_epoch, accumulate, bool(self._dry_run), start)

    def setup(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Discard the compression of another module, and show the phase on the progress bar."""
        self._dry_run.planned = False
        if not self._fit.fitting:
            return
        self._config, self._schedule = self._asked.within(trainer)
        if self.life.phase is Phase.WAIT:
            self.life.follow(self._config, self._schedule.calibration_batches, self._schedule.calibration_epochs)
        elif self.life.phase in (Phase.RECOVER, Phase.DONE):
            self.recovers_from = 0
            if not self._goes_on(module):
                self._start_over()
        self._fit.on_close(self._parking.bring_back)
        if self._fit.turn.number == 1:
            self._fit.borrow(shown_on_bar(trainer, lambda: self._fit.turn.shown(trainer, self.life)))

    def go_on_after(self, trainer: L.Trainer, module: L.LightningModule) -> bool:
        """Return True if this module is already low-rank, so that its factors train on; otherwise start over."""
        expect_own_metrics(trainer, self._fit.turn.prefix)
        if self.life.phase not in (Phase.RECOVER, Phase.DONE):
            return False
        if self._goes_on(module):
            self._compressed = weakref.ref(module)
            return True
        self._start_over()
        return False

    def begin(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Refuse unsupported runs before the first batch, then start or continue from a checkpoint."""
        adapter, life, turn = self._fit.adapter, self.life, self._fit.turn
        refuse_fit(trainer, module, adapter, self._config)
        plan_path = self._dry_run.locate(trainer)
        with adapter.team.together():
            refuse_stale_groups(trainer, module)
            if plan_path is not None and trainer.is_global_zero:
                check_plan_output(plan_path)
            if life.phase is Phase.WAIT:
                life.epoch_length = math.inf
                needed = self._meaning.batches_needed(trainer.num_training_batches, most_accumulated(trainer))
                needed = 1 if self._schedule.extend_training else needed + (self._recovery is not None)
                refuse_too_short(trainer, self._schedule.start_epoch, self._schedule.start_step, needed)
            if self._config.asks_model:
                self._meaning.student(module)
            if tried := turn.can_be_tried or life.phase is not Phase.WAIT:
                self._attach(trainer, module)
                self._recovering.refuse(trainer, module, life)
        self._recovering.watch(module, life)
        if tried:
            announce(trainer, life, self._schedule, turn.title, plans=bool(self._dry_run))
        self._asked.tell(trainer, life, first_only=bool(self._dry_run))
        if turn.earlier and not turn.later and life.phase is Phase.WAIT:
            compare_ratios(turn.earlier[0])
        telemetry.log_phase(trainer, turn.prefix, life.phase)
        self.go_on_if_enough(trainer, module)

    def _attach(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Start the compression of the module, or continue it from a checkpoint."""
        adapter = self._fit.adapter
        replay = Replay(trainer, module, adapter, self._meaning)
        refuse_limits(trainer, self.life.config.limits)
        later = self._schedule.start_epoch > 0 or self._schedule.start_step > 0
        state = adapter.state_bytes or (2 * adapter.trained_bytes if later else 0)
        self._parking.setting = adapter.parks(self._schedule.park_optimizer)
        self.life.attach(module, self._progress, adapter, Safeguard(replay), Beside(state, self._parking.setting))
        gathering = self.life.compression.gathering
        gathering.can_overflow, gathering.logits_model = scales(trainer), self._meaning.student

    def start_batch(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Start the compression at the first batch that meets both conditions of the schedule, and park the state."""
        turn = self._fit.turn
        if self._is_due(trainer):
            turn.take_over(trainer, module)
            self.life.start()
            if turn.earlier or is_outdated(self.life.compression):
                self._attach(trainer, module)
            telemetry.log_phase(trainer, turn.prefix, self.life.phase)
        if self.life.gathering and not self._parking.rests:
            with self._fit.adapter.team.together():
                self._parking.park(trainer.optimizers, self.life.compression.config.place)

    def _is_due(self, trainer: L.Trainer) -> bool:
        schedule = self._schedule
        started = trainer.current_epoch >= schedule.start_epoch and trainer.global_step >= schedule.start_step
        return started and self.life.phase is Phase.WAIT and self._fit.turn.may_begin and not self._dry_run.planned

    def end_batch(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """End the observation, and advance once there are enough batches and the accumulation window is closed.

        Raises:
            CalibrationError: the batch is None, or incomplete.
        """
        life = self.life
        life.batches_into_epoch = batch_idx + 1
        if batch is None and (life.gathering or self._is_due(trainer)):
            refuse_none(batch_idx, trainer.current_epoch)
        if life.phase is Phase.WAIT:
            hold_early_stopping(trainer, self._fit.turn.prefix)
        if (observed := life.batch) is None:
            return
        life.close()
        observed.refuse_incomplete(f"calibration batch {batch_idx} of epoch {trainer.current_epoch}")
        hold_early_stopping(trainer)
        if self._schedule.extend_training:
            self._fit.limits.add(trainer, observed.stepped, self._batches_per_epoch(trainer))
        needed = life.limit(life.phase, self._batches_per_epoch(trainer))
        telemetry.log_progress(trainer, self._fit.turn.prefix, life.batches, needed)
        self.go_on_if_enough(trainer, module)

    def end_epoch(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Record the length of the epoch, for loaders of unknown length, and advance if there are enough batches."""
        self.life.close()
        self.life.epoch_length = self.life.batches_into_epoch
        if self._schedule.extend_training:
            self._fit.limits.recount(trainer, self._batches_per_epoch(trainer))
        self.go_on_if_enough(trainer, module)

    def end_training(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Finish the compression. If it is incomplete, restore the model and raise UnfinishedError."""
        if self.life.phase is Phase.RECOVER:
            self.life.phase = Phase.DONE
            telemetry.log_phase(trainer, self._fit.turn.prefix, self.life.phase)
        elif self.life.phase is not Phase.DONE and not self._dry_run.planned:
            self.give_up(module)

    def quantize(self, module: L.LightningModule) -> None:
        """Convert the trained factors to 8 bits if the storage requires it. Checkpoints of the fit stay as they are."""
        report = self.life.report
        if self.life.phase is Phase.DONE and report is not None and self._config.form.rounds:
            layers = [
                name
                for name, layer in report.layers.items()
                if layer.in_8_bits and not isinstance(module.get_submodule(name), EightBitLinear)
            ]
            quantize_layers(module, layers, self._config.storage, self.life.importances)

    def leave_after_exception(self, module: L.LightningModule) -> None:
        """Restore everything, unless the model was factorized already."""
        if self.life.gathering:
            for parameter in module.parameters():
                parameter.grad = None
        if self.life.phase not in (Phase.RECOVER, Phase.DONE):
            self.abandon(module)

    def give_up(self, module: L.LightningModule) -> None:
        """Restore the model and raise UnfinishedError."""
        phase, seen = self.life.phase, self.life.batches
        self.abandon(module)
        raise UnfinishedError(
            f"training ended in phase '{phase}'{self._fit.turn.which} after {seen} of its batches, before the model "
            "was factorized, and the model was put back; train longer, start earlier, or lower calibration_batches, "
            "truncations or corrections"
        )

    def abandon(self, module: L.LightningModule) -> None:
        """Restore the module and the Trainer's limits, and return to WAIT."""
        if self._fit.in_this_process:
            touched, adapter = self.life.has_touched, self._fit.adapter
            if touched:
                adapter.unwrap_parameters()
            self.life.abandon(module, adapter)
            if touched:
                adapter.sync_requires_grad()
                adapter.discard_replaced()
            self._parking.bring_back()
        self._fit.give_up_limits()
        self.recovers_from = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the compression and the extended limits, as plain types and tensors."""
        over, batch = self._fit.batch_is_over, self.life.batch
        uncounted = self._schedule.extend_training and over and batch is not None
        team = self._fit.adapter.team if self._fit.in_this_process else None
        return self.life.state_dict(over, team) | {
            "allowance": self._fit.limits.state_dict(uncounted, batch is not None and batch.stepped),
            "recovers_from": self.recovers_from,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the state of a checkpoint in a fit. Raises CheckpointError if it does not match."""
        if self._fit.fitting:
            self.life.load_state_dict(state)
            self.recovers_from = state["recovers_from"]
            self._fit.resumed = True

    def refuse_checkpoint(self, checkpoint: Mapping[str, Any], state: Mapping[str, Any] | None) -> None:
        """Raise CheckpointError if a fit cannot continue from a checkpoint. Nothing is loaded before."""
        if self._fit.fitting:
            refuse_rounded(checkpoint)
            self._fit.turn.refuse_checkpoint(checkpoint.get("callbacks", {}))
            if state is not None:
                self.refuse_state(state)

    def refuse_state(self, state: Mapping[str, Any]) -> None:
        """Raise CheckpointError if this fit cannot continue from a callback state."""
        self.life.check(state)
        refuse_damaged(RUN, state)
        self._dry_run.refuse_state(state["phase"], is_dense=self.life.is_dense_at(state["position"]))

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies and other processes."""
        return self.__dict__ | {"_compressed": None, "_parking": Parking()}

    def go_on_if_enough(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Advance from CALIBRATE or CORRECT to the next phase, if there are enough batches."""
        life = self.life
        if not life.enough(trainer.num_training_batches):
            return
        self._fit.adapter.unwrap_parameters()
        if self._dry_run and life.stage.truncates:
            self._dry_run.write(trainer, life.compression, shortened=self._asked.is_shortened(trainer))
            self.abandon(module)
            self._fit.borrow(stopping_now(trainer))
            return
        was_dense, turn = life.is_dense, self._fit.turn
        if was_dense and life.stage.truncates:
            call_to_measure(self._meaning.on_before_truncation, trainer, module)
        with life.changing_weights():
            telemetry.log_stage(trainer, turn.prefix, life.advance(), life.compression)
            if was_dense:
                start_ranking_afresh(trainer, "compressed" if turn.earlier else "dense", turn.prefix)
            if life.phase is Phase.FACTORIZE:
                self._factorize(trainer, module)
        if life.phase is Phase.RECOVER:
            call_to_measure(self._meaning.on_compressed, trainer, module)
        telemetry.log_phase(trainer, turn.prefix, life.phase)

    def _factorize(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        def set_up_optimizers() -> None:
            self._fit.adapter.rebuild_optimizers()
            refuse_stale_groups(trainer, module)

        self.recovers_from = trainer.global_step
        self._recovering.take_teacher(module, self.life)
        if (guard := self.life.compression.safeguard) is not None:
            guard.refuses = not trains_on(trainer)
        self.life.factorize(trainer.global_step, set_up_optimizers)
        self._parking.bring_back(trainer.optimizers)
        self._fit.adapter.discard_replaced()
        self._recovering.start(trainer, module, self.life)
        start_ranking_afresh(trainer, "truncated", self._fit.turn.prefix)
        conclude(self.life.report, module)
        self._compressed = weakref.ref(module)

    def _goes_on(self, module: L.LightningModule) -> bool:
        """Return True if this compression of the module is over, even if a later one has changed the layers since."""
        runs = [self, *(callback.run for callback in self._fit.turn.later)]
        return self._fit.resumed or any(run.has_compressed(module) for run in runs)

    def has_compressed(self, module: L.LightningModule) -> bool:
        """Return True if this module is the reported one and still has the reported ranks."""
        if (report := self.life.report) is None or self._compressed is None or self._compressed() is not module:
            return False
        return has_reported_ranks(module, report)

    def _start_over(self) -> None:
        self.life, self.recovers_from, self._fit.limits = self.fresh(), None, ExtendedLimits()

    def _batches_per_epoch(self, trainer: L.Trainer) -> float:
        return min(trainer.num_training_batches, self.life.epoch_length)
