"""Progress of a compression inside a training run, and the state that a checkpoint needs to continue it.

WAIT ends at the scheduled start. CALIBRATE and CORRECT end once there are statistics of enough batches. The steps that
use the statistics run between two batches.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any, TypeVar

from torch import nn

from zssvd_lightning.calibration.masks import TokenMask
from zssvd_lightning.callbacks.callback_state import VERSION, refuse_state
from zssvd_lightning.callbacks.observed_batch import ObservedBatch
from zssvd_lightning.callbacks.trainer.guards import window_end
from zssvd_lightning.callbacks.trainer.recompression import stand_ins_in_training
from zssvd_lightning.compression.corrections import reestimate_batch_norms
from zssvd_lightning.compression.course import Stage, course, to_first_truncation
from zssvd_lightning.compression.engine import Compression
from zssvd_lightning.compression.memory.extent import Beside, extent_of
from zssvd_lightning.compression.memory.limits import within_limits
from zssvd_lightning.compression.phase import GATHERING, Phase, phase_is_after
from zssvd_lightning.compression.report import Report
from zssvd_lightning.compression.safeguard import Safeguard
from zssvd_lightning.compression.snapshot import put_back, state_of, take_up
from zssvd_lightning.config.compression import CompressionConfig
from zssvd_lightning.distributed import Team
from zssvd_lightning.recovery.run import RecoveryRun
from zssvd_lightning.recovery.settings import Recovery
from zssvd_lightning.serialization.kept_batches import number_to_keep_back
from zssvd_lightning.strategies import StrategyAdapter
from zssvd_lightning.whitening.rounding import Importance

Entered = TypeVar("Entered")


class Lifecycle:
    """Lifecycle of one compression in a training loop.

    Args:
        config: settings of the compression.
        calibration_batches: maximum number of batches per calibration.
        calibration_epochs: maximum number of passes over the training data per calibration. The lower limit applies.
        recovery: settings of the recovery; None to train with the optimizer of `configure_optimizers`.

    Attributes:
        phase: current phase.
        report: report of the compression; None before FACTORIZE.
        importances: importance of each low-rank layer after FACTORIZE, for `quantize`; None unless it is needed.
        batch: the observed batch, if any.
        reference_terms: number of loss terms of the first batch of a gathering; gradient weights are relative to it.
        batches_into_epoch: number of finished batches in this epoch.
        epoch_length: number of batches in an epoch; infinite until an epoch has ended.
        first_losses: losses of the batches between FACTORIZE and the first optimizer step; None at other times.
        recovery: the recovery; None to train with the optimizer of `configure_optimizers`.
    """

    def __init__(
        self,
        config: CompressionConfig,
        calibration_batches: int,
        calibration_epochs: int,
        recovery: Recovery | None = None,
    ) -> None:
        self.recovery = None if recovery is None else RecoveryRun(recovery)
        self.phase = Phase.WAIT
        self.report: Report | None = None
        self.importances: dict[str, Importance] | None = None
        self.batch: ObservedBatch | None = None
        self.reference_terms: float | None = None
        self.batches_into_epoch = 0
        self.epoch_length = math.inf
        self.first_losses: list[float] | None = None
        self._compression: Compression | None = None
        self._position = 0
        self._restored: Mapping[str, Any] | None = None
        self._changing = False
        self.follow(config, calibration_batches, calibration_epochs)

    def follow(self, config: CompressionConfig, calibration_batches: int, calibration_epochs: int) -> None:
        """Use other settings from now on; call it only before the compression has started."""
        self.config = config
        self._calibration = (calibration_batches, calibration_epochs)
        self._stages: list[Stage] = course(config)

    @property
    def compression(self) -> Compression:
        """The current compression. Raises RuntimeError if none is in progress."""
        if self._compression is None:
            raise RuntimeError(f"no compression is under way in phase {self.phase!r}")
        return self._compression

    @property
    def active_recovery(self) -> RecoveryRun | None:
        """The recovery if it is active, otherwise None."""
        return self.recovery if self.recovery is not None and self.recovery.active else None

    @property
    def has_touched(self) -> bool:
        """True if there are changes to undo."""
        return self._compression is not None or self._restored is not None

    @property
    def gathering(self) -> bool:
        """True if the current phase gathers statistics."""
        return self.phase in GATHERING

    @property
    def batches(self) -> int:
        """Number of batches in the statistics of the current stage."""
        return self._compression.gathering.moments.batches if self._compression is not None else 0

    def batches_needed(
        self, batches_per_epoch: float, accumulate: int, first_only: bool = False, start: int = 0
    ) -> int:
        """Return the number of training batches from batch `start` of the fit until the last (or first) truncation."""
        done = start
        for stage in to_first_truncation(self._stages) if first_only else self._stages:
            done = window_end(done + self.limit(stage.gathers, batches_per_epoch), batches_per_epoch, accumulate)
        return done - start

    def limit(self, phase: Phase, batches_per_epoch: float) -> int:
        """Return the number of batches that `phase` gathers statistics from."""
        if phase is Phase.CORRECT:
            return self.config.correction_batches
        batches, epochs = self._calibration
        return int(min(batches, epochs * batches_per_epoch))

    def attach(
        self, model: nn.Module, progress: bool, adapter: StrategyAdapter, safeguard: Safeguard, beside: Beside
    ) -> None:
        """Start the compression of `model`, or continue it from a checkpoint.

        Args:
            model: the model to compress.
            progress: draw progress bars.
            adapter: adapter for the strategy that runs the model.
            safeguard: comparison of states on batches kept back, without batches yet.
            beside: what the optimizers take on the device, for limits of memory.

        Raises:
            UnsupportedTrainingError: layers are laid out over the processes in an unsupported way.
            CheckpointError: the checkpoint belongs to other layers or settings.
            TargetError: there is no layer to compress.
        """
        if self.phase in (Phase.RECOVER, Phase.DONE):
            return
        stand_ins = stand_ins_in_training(model, self.config, adapter, self.recovery)
        with stand_ins.meanwhile(keep=self.gathering):
            parts = (progress, adapter.team, adapter.replace, stand_ins)
            build = partial(
                within_limits,
                lambda config: Compression(model, config, *parts),
                self.config,
                lambda run: replace(extent_of(model, run.targets, 0, None), beside=beside),
                blocks=False,
            )
            compression = build()
            adapter.refuse_layers(compression.targets)
            compression.safeguard = safeguard
            saved = (self._restored or {}).get("compression")
            if self.gathering and saved is not None:
                take_up(compression, saved)
            elif saved is not None:
                put_back(compression, saved)
                compression = build()
                compression.safeguard = safeguard
        self._compression, self._restored = compression, None

    def release(self) -> None:
        """Let go of the model before the compression has started. It must then be attached again."""
        self._compression = None

    def start(self) -> None:
        """Enter the first phase that gathers statistics."""
        self.phase = self._stages[0].gathers

    def write_low_rank(self, weights: dict[str, Any]) -> None:
        """In a state dict of the model, replace layers that are dense only meanwhile; see `StandIns.write_low_rank`."""
        if self._compression is not None and self._compression.stand_ins is not None:
            self._compression.stand_ins.write_low_rank(weights)

    def open(self, mask: TokenMask, terms: float) -> ObservedBatch:
        """Start to observe a batch. Collective for the first batch of a gathering."""
        self.close()
        if self.reference_terms is None:
            self.reference_terms = max(self.compression.team.gathered(terms))
        self.batch = ObservedBatch(self.compression, self.phase, terms, mask)
        return self.batch

    def keeps_back(self, batches_per_epoch: float) -> bool:
        """Return True if another batch is to be kept back."""
        guard = self.compression.safeguard
        limit = self.limit(self._stages[0].gathers, min(batches_per_epoch, self.epoch_length))
        return guard is not None and guard.wants_batches and len(guard.batches) < number_to_keep_back(limit)

    def close(self) -> None:
        """End the observation of a batch, even if the batch was aborted."""
        batch, self.batch = self.batch, None
        if batch is not None:
            batch.close()

    def enough(self, batches_per_epoch: float) -> bool:
        """Return True if the statistics of the current stage are complete, including all gradients."""
        limit = self.limit(self.phase, min(batches_per_epoch, self.epoch_length))
        return self.gathering and self.batches >= limit and not self.compression.gathering.pending

    @contextmanager
    def changing_weights(self) -> Iterator[None]:
        """Mark the weights as changing until the block ends. Checkpoints then contain the original weights."""
        self._changing = True
        try:
            yield
        finally:
            self._changing = False

    def advance(self) -> Stage:
        """Run the acts of the current stage, enter the next phase and return the stage; call in `changing_weights`."""
        stage = self.stage
        self.phase = Phase.TRUNCATE if stage.truncates else Phase.CORRECT
        self.reference_terms = None
        self.compression.take(stage)
        self._position += 1
        following = self._stages[self._position :]
        self.phase = following[0].gathers if following else Phase.FACTORIZE
        return stage

    @property
    def stage(self) -> Stage:
        """The current stage."""
        return self._stages[self._position]

    @property
    def phases(self) -> list[Phase]:
        """Phases in which the stages gather statistics, in order."""
        return [stage.gathers for stage in self._stages]

    @property
    def is_dense(self) -> bool:
        """True if no truncation has taken place yet."""
        return self.is_dense_at(self._position)

    def is_dense_at(self, position: int) -> bool:
        """Return True if none of the first `position` stages truncates."""
        return not any(stage.truncates for stage in self._stages[:position])

    def factorize(self, step: int, set_up_optimizers: Callable[[], None]) -> None:
        """Insert the low-rank layers, set up their optimizers and create the report; call in `changing_weights`.

        Args:
            step: current global step.
            set_up_optimizers: called after the layers were inserted.
        """
        model, recovery = self.compression.model, self.recovery
        if recovery is None:
            self.compression.factorize()
        else:
            recovery.sync_requires_grad(model)
            self.compression.factorize(recovery.dress)
            recovery.begin(model, step)
        with self.compression.stopwatch(Phase.FACTORIZE.value):
            set_up_optimizers()
            reestimate_batch_norms(self.compression)
        self.report, self.importances = self.compression.report(), self.compression.importances
        self.report.config = {"compression": asdict(self.config)}
        if recovery is not None:
            self.report.config |= {"recovery": recovery.settings.to_dict()}
        self._compression, self.first_losses = None, []
        self.phase = Phase.RECOVER

    def abandon(self, model: nn.Module, adapter: StrategyAdapter) -> None:
        """Restore the model, even from a loaded checkpoint that was not continued, and return to WAIT."""
        self.close()
        if self._compression is not None:
            self._compression.restore()
        elif self._restored is not None and self._restored["compression"] is not None:
            stand_ins = stand_ins_in_training(model, self.config, adapter, self.recovery)
            with stand_ins.meanwhile():
                compression = Compression(model, self.config, False, adapter.team, adapter.replace, stand_ins)
                put_back(compression, self._restored["compression"])
        if self.recovery is not None:
            if self.recovery.active:
                self.recovery.let_go(model)
            self.recovery = RecoveryRun(self.recovery.settings)
        self._compression, self._restored, self.reference_terms, self._position = None, None, None, 0
        self.phase = Phase.WAIT

    def state_dict(self, batch_over: bool = True, team: Team | None = None) -> dict[str, Any]:
        """Return plain types and tensors; valid at any moment.

        In the middle of a batch, the current gathering is left out. It restarts after loading, so that no batch counts
        twice. While weights change, the state is that before the compression, with the original weights.

        Args:
            batch_over: True if the latest batch will not be repeated, even if it is still observed.
            team: processes of the run, all of which must call this method; None outside a run.
        """
        phase, position, reference_terms, compression = self.phase, self._position, self.reference_terms, None
        changing = self._changing and self._compression is not None
        whole_batches = self.batch is None or batch_over
        if self._compression is not None and (self.gathering or changing):
            compression = state_of(self._compression, statistics=whole_batches or changing)
        if changing:
            phase, position, reference_terms = Phase.WAIT, 0, None
        elif not whole_batches:
            reference_terms = None
        return {
            "version": VERSION,
            "phase": phase.value,
            "position": position,
            "calibration": list(self._calibration),
            "terms_unit": reference_terms,
            "batches_into_epoch": self.batches_into_epoch,
            "epoch_length": self.epoch_length,
            "first_losses": None if self.first_losses is None else list(self.first_losses),
            "compression": compression,
            "report": None if self.report is None else self.report.to_dict(),
            "recovery": None if self.recovery is None else self.recovery.state_dict(team),
            "importances": None if self.importances is None else {n: list(i) for n, i in self.importances.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a `state_dict`. The next `attach` continues with its model.

        Raises:
            CheckpointError: see `check`.
        """
        self.check(state)
        self.batch, self._compression = None, None
        self.phase = Phase(state["phase"])
        self._position = state["position"]
        self.reference_terms = state["terms_unit"]
        self.batches_into_epoch = state["batches_into_epoch"]
        self.epoch_length = state["epoch_length"]
        self.first_losses = state["first_losses"]
        self.report = None if state["report"] is None else Report.from_dict(state["report"])
        found = state["importances"]
        self.importances = None if found is None else {name: Importance(*pair) for name, pair in found.items()}
        if self.recovery is not None and phase_is_after(state):
            self.recovery.load_state_dict(state["recovery"])
        self._restored = None if phase_is_after(state) else state

    def check(self, state: Mapping[str, Any]) -> None:
        """Raise CheckpointError unless `load_state_dict` can load a state; see `callback_state.refuse_state`."""
        refuse_state(state, self, self._calibration)
