"""Callback that compresses a model during a training run. Each hook calls the parts that do the work.

| hook                     | action                                                            | parts                |
|--------------------------|-------------------------------------------------------------------|----------------------|
| setup                    | enter the run, hook into its checkpoints, show the phase          | all parts            |
| teardown                 | merge adapters from a checkpoint, undo all overrides              | recovering, fit      |
| on_train_start           | refuse unsupported runs, or continue from a checkpoint            | run, recovering      |
| on_train_batch_start     | start compression when it is due, observe a calibration batch     | run, observer        |
| on_before_backward       | check the loss, weight its gradient by its number of terms        | recovering, observer |
| on_after_backward        | record that the batch is complete                                 | observer             |
| on_before_optimizer_step | collect calibration gradients, check recovery gradients           | observer, recovering |
| on_before_zero_grad      | collect gradients that no optimizer step follows                  | observer             |
| on_train_batch_end       | end the observation, enter the next phase or stage                | recovering, run      |
| on_train_epoch_end       | the same, for loaders of unknown length                           | run                  |
| on_train_end             | return to the best state, finish, or raise UnfinishedError        | recovering, run      |
| on_fit_end               | merge adapters, convert factors to 8 bits                         | recovering, run      |
| on_exception             | restore everything, unless the model was factorized               | all parts            |
| state_dict               | save the state of the compression                                 | run                  |
| load_state_dict          | load the state of the compression                                 | run                  |
| on_load_checkpoint       | restore the extended limits of the Trainer                        | fit                  |
| on_save_checkpoint       | add the note for loads without support for low-rank layers        |                      |

`lifecycle.py` tracks the progress of the compression; `compression/` changes the model.
"""

import functools
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self, Unpack, cast

import lightning as L
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn

from zssvd_lightning._types import of_type
from zssvd_lightning._validation import require
from zssvd_lightning.calibration.batches import loss_terms, predicts_first_label, token_mask
from zssvd_lightning.callbacks.batch_observer import BatchObserver
from zssvd_lightning.callbacks.compression_run import CompressionRun
from zssvd_lightning.callbacks.fit_context import FitContext
from zssvd_lightning.callbacks.lifecycle import Lifecycle
from zssvd_lightning.callbacks.recovery import RecoveryHooks, refuse_contradictions
from zssvd_lightning.callbacks.schedule import CallbackSettings, Schedule, schedule_of
from zssvd_lightning.callbacks.several.order import refuse_several
from zssvd_lightning.callbacks.several.turn import Turn
from zssvd_lightning.callbacks.trainer.guards import refuse_other_package
from zssvd_lightning.callbacks.trainer.judging import judged_by
from zssvd_lightning.callbacks.trainer.trial_runs import dry_run_of
from zssvd_lightning.compression.phase import Phase
from zssvd_lightning.compression.quantization import in_8_bits_already
from zssvd_lightning.compression.report import Report
from zssvd_lightning.config.compression import CompressionConfig
from zssvd_lightning.config.presets import TRAINED, trained_by
from zssvd_lightning.config.settings import Settings
from zssvd_lightning.model.logits import model_with_logits
from zssvd_lightning.recovery.methods import recovery_of
from zssvd_lightning.recovery.settings import Recovery
from zssvd_lightning.serialization.state_dict import note
from zssvd_lightning.whitening.moments import Moments

logger = logging.getLogger(__name__)


class ZSSVDCallback(L.Callback):
    """Callback that compresses the model during `trainer.fit`, by Zero Sum SVD (arXiv 2602.02848) or a related method.

    It works on any `LightningModule` with automatic optimization and one optimizer whose `training_step` returns a mean
    loss. During calibration, dropout is off, no weight changes and the optimizer keeps its state, but the batches count
    as steps for `max_steps` and schedulers. `training_step` runs again on a few calibration batches, without traces, to
    take back corrections that raise their loss. After factorization, `configure_optimizers` runs again, or the
    optimizer of `recovery` is set up, so that the learning-rate schedule starts with the training of the factors.
    Training can resume from a checkpoint of any phase. Several callbacks in one Trainer compress one after another.

    Args:
        prune_ratio: fraction of the target layers' parameters to remove, in (0, 1).
        preset: name of a preset, such as `best`, `zs-svd` (the paper) or `svd-llm`; see `config/presets/`. None for
            `best`. `best-trained` has a recovery of its own, unless one is given.
        schedule: start and length of the compression: a `Schedule` or a mapping of its fields.
        recovery: training of the factors, such as `LoRARecovery(rank=8, lr=1e-3)`, the name of its method (`lora`,
            `factors` or `singular_values`), or a mapping of its `method` and fields. None to train them with the
            module's optimizer.
        held_out: batches that are in no other part of the run. They are measured every `judge_every` steps of the
            recovery, and the model ends with the best state on them, or as it was compressed. None for the last state.
        dry_run: only calibrate, write the ranks that would be chosen to this file, restore the model and stop. True
            writes `zssvd_plan.yaml` in the folder of the logger.
        progress: show the computation of spectra on the Trainer's progress bar.
        compression: settings of `CompressionConfig`, such as `metric="two_sided"`, which override the preset.

    Attributes:
        phase: current `Phase` of the compression.
        report: report of the compression; None before FACTORIZE.
        recovers_from: global step of this fit at which training of the factors started; None before.

    Raises:
        ConfigError: an argument has another type or is out of range.
        UnsupportedTrainingError: at the start of `fit`, if the run is too short or of an unsupported kind.
        TargetError: at the start of `fit`, if there is no layer to compress.
        PlanError: at the start of `fit`, if the plan cannot be read or belongs to another model.
        OutputError: at the start of `fit`, if a dry run would overwrite a file.
        CheckpointError: at the start of `fit`, `validate`, `test` or `predict`, if the checkpoint belongs to another
            model or to a compression with other settings. The model is then unchanged.
        LogitsError: at the start of `fit`, if drawn output gradients, refits or distillation need the model that
            returns the logits, and it cannot be determined; override `student`.
        RecoveryError: at the start of `fit` or at factorization, if `recovery` has nothing to train. The model is then
            restored.
        TeacherError: at the start of `fit` or at factorization, if there is nothing to distill from. The model is then
            restored.
        DivergedError: during the recovery, if a loss or gradient is not finite. The low-rank model then has its last
            good weights.
        CalibrationError: during `fit`, if batches do not provide the required statistics. The model is then restored.
        UnfinishedError: at the end of `fit`, if training stopped before the model was factorized.

    Example:
        >>> trainer = L.Trainer(max_epochs=3, callbacks=[ZSSVDCallback(prune_ratio=0.4)])  # doctest: +SKIP
    """

    def __init__(
        self,
        prune_ratio: float = 0.2,
        preset: str | None = None,
        *,
        schedule: Schedule | dict[str, Any] = Schedule(),
        recovery: Recovery | dict[str, Any] | str | None = None,
        held_out: Iterable[Any] | None = None,
        dry_run: bool | str | Path = False,
        progress: bool = True,
        **compression: Unpack[CallbackSettings],
    ) -> None:
        settings: dict[str, Any] = dict(compression)
        self.schedule = schedule_of(schedule).with_flat(settings)
        self.dry_run = dry_run_of(dry_run, settings)
        if preset in TRAINED:
            preset, told = trained_by(preset)
            if recovery is None:
                recovery = told
            elif isinstance(recovery, Mapping) and "method" not in recovery:
                recovery = told | dict(recovery)
        self.config = CompressionConfig.asked(None, preset, cast("Settings", {"prune_ratio": prune_ratio} | settings))
        self.recovery = recovery_of(recovery)
        refuse_contradictions(self.config, self.recovery, plans=bool(dry_run))
        progress = of_type(bool, progress, "progress")
        super().__init__()
        self.fit = FitContext()
        self.recovering = RecoveryHooks(self.fit, self, judged_by(held_out, self.recovery))
        self.observer = BatchObserver(self.fit, self)
        self.run = CompressionRun(
            self.fit, self, self.recovering, self.config, self.schedule, self.recovery, self.dry_run, progress
        )

    @classmethod
    def from_config(
        cls,
        config: CompressionConfig,
        *,
        schedule: Schedule | dict[str, Any] = Schedule(),
        recovery: Recovery | dict[str, Any] | str | None = None,
        held_out: Iterable[Any] | None = None,
        dry_run: bool | str | Path = False,
        progress: bool = True,
    ) -> Self:
        """Return a callback for a `CompressionConfig`, such as that of a recipe. Other arguments: see the class."""
        require(isinstance(config, CompressionConfig), "config", config, "a CompressionConfig")
        rest: dict[str, Any] = {"held_out": held_out, "dry_run": dry_run, "progress": progress}
        return cls(**asdict(config), schedule=schedule, recovery=recovery, **rest)

    @property
    def phase(self) -> Phase:
        """Current phase of the compression."""
        return self.run.life.phase

    @property
    def report(self) -> Report | None:
        """Report of the compression; None before FACTORIZE."""
        return self.run.life.report

    @property
    def recovers_from(self) -> int | None:
        """Global step of this fit at which training of the factors started; None before."""
        return self.run.recovers_from

    @property
    def statistics(self) -> Moments:
        """Statistics of the current stage. Raises RuntimeError if no compression is in progress."""
        return self.run.life.compression.gathering.moments

    def token_mask(self, batch: Any) -> Tensor | None:
        """Return the mask (B, T) of the positions of a batch that are not padding.

        None goes by the masks that the model is called with. Override this method for batches without an
        `attention_mask` whose model is not called with one either.
        """
        return token_mask(batch)

    def loss_terms(self, batch: Any) -> float:
        """Return the number of terms in the mean loss of a batch.

        Override this method for batches without `labels`, and for losses that are no mean over all labels.
        """
        trainer = self.fit.trainer
        return loss_terms(batch, shifts=trainer is None or not predicts_first_label(trainer.lightning_module))

    def student(self, pl_module: L.LightningModule) -> nn.Module:
        """Return the model whose logits the loss uses. Override this method if it is no transformers model."""
        return model_with_logits(pl_module)

    def on_before_truncation(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Do nothing. Override this hook to measure the dense model right before its first truncation.

        The module is in evaluation mode and gradients are off, in every process.
        """

    def on_compressed(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Do nothing. Override this hook to measure the low-rank model right after factorization, before training.

        The module is in evaluation mode and gradients are off, in every process. `report` is complete.
        """

    @property
    def state_key(self) -> str:
        """Key of the state in checkpoints. Later compressions of a Trainer add their number to it, from 2 on."""
        return self.fit.turn.key(super().state_key)

    def batches_needed(self, batches_per_epoch: float = math.inf, accumulate: int = 1, start: int = 0) -> int:
        """Return the number of training batches from batch `start` of the fit until the model is factorized."""
        return self.run.batches_needed(batches_per_epoch, accumulate, start)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Make the module's structure follow the checkpoints it loads, and show the phase on the progress bar."""
        refuse_other_package(trainer)
        everyone = [each for each in trainer.callbacks if isinstance(each, ZSSVDCallback)]  # type: ignore[attr-defined]
        self.fit.open(trainer, pl_module, stage, Turn.of(self, everyone))
        self.run.setup(trainer, pl_module)
        prepared = functools.partial(self._prepared, pl_module)
        self.fit.follow_checkpoints(trainer, pl_module, self._check, prepared, self.state_key)
        self.recovering.setup(trainer, pl_module, self._life)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Undo the overrides of `setup`. Raises UnfinishedError if a fit without batches ended while gathering."""
        self.recovering.teardown(pl_module, stage)
        self.fit.close()
        if self.run.life.gathering and stage == "fit":
            self.run.give_up(pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse unsupported runs before the first batch, or continue from a checkpoint."""
        if self.fit.turn.number == 1:
            refuse_several(trainer, self)
        if not self.run.go_on_after(trainer, pl_module):
            self.run.begin(trainer, pl_module)
        elif not self.fit.turn.later_has_started:
            if in_8_bits_already(pl_module):
                logger.warning("the layers are in 8 bits already; only what is beside their codes will be trained")
            self.recovering.resume(trainer, pl_module, self.run.life)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start compression when it is due, and observe the batch while statistics are gathered."""
        self.recovering.start_batch(self.run.life)
        self.run.start_batch(trainer, pl_module)
        self.observer.start_batch(trainer, pl_module, self.run.life, batch)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Record the loss, and scale its gradient from that of a mean to that of a sum over its terms."""
        self.recovering.note_loss(trainer, self.run.life, loss)
        self.observer.weigh_loss(trainer, self.run.life, loss)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record that the loss and the gradients of the batch are complete."""
        self.observer.complete_batch(self.run.life)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Collect the gradients of the accumulation window before clipping, and clear them for the optimizer."""
        self.observer.take_gradients(trainer, self.run.life, optimizer)
        self.recovering.check_step(trainer, pl_module, self.run.life)

    def on_before_zero_grad(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Collect gradients that no step follows, for instance because an overridden `optimizer_step` skips steps."""
        self.observer.take_gradients_without_step(trainer, self.run.life)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """End the observation, and advance once there are enough batches and the accumulation window is closed."""
        self.recovering.end_batch(trainer, pl_module, self.run.life)
        self.run.end_batch(trainer, pl_module, batch, batch_idx)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the length of the epoch, for loaders of unknown length, and advance if there are enough batches."""
        self.run.end_epoch(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Finish the compression. If it is incomplete, restore the model and raise UnfinishedError."""
        self.recovering.settle(trainer, pl_module, self.run.life)
        self.run.end_training(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Merge adapters, and convert the trained factors to 8 bits if the storage requires it."""
        self.recovering.finish(pl_module, self.run.life)
        self.run.quantize(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Restore everything, unless the model was factorized already."""
        self.run.leave_after_exception(pl_module)
        self.recovering.leave_after_exception(trainer, pl_module, self.run.life)
        self.teardown(trainer, pl_module, "fit" if self.fit.fitting else str(trainer.state.fn))

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the compression and the extended limits, as plain types and tensors."""
        return self.run.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of a checkpoint in a fit. Raises CheckpointError if it does not match."""
        self.run.load_state_dict(state_dict)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Raise the Trainer's limits to those at the time of saving, before the Trainer compares progress with them."""
        if self.fit.fitting and (state := checkpoint["callbacks"].get(self.state_key)) is not None:
            self.fit.take_up_limits(trainer, state)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the note for loads without support for low-rank layers. It is also added after the run.

        Layers that are dense only while they are compressed again are saved as the low-rank layers they stand for.
        """
        self.run.life.write_low_rank(checkpoint["state_dict"])
        checkpoint["state_dict"].update(note(pl_module))

    def refuse_state(self, state: Mapping[str, Any]) -> None:
        """Raise CheckpointError if this fit cannot continue from a callback state. Nothing is loaded before."""
        self.run.refuse_state(state)

    def _life(self) -> Lifecycle:
        return self.run.life

    def _check(self, checkpoint: Mapping[str, Any]) -> None:
        self.run.refuse_checkpoint(checkpoint, checkpoint.get("callbacks", {}).get(self.state_key))

    def _prepared(self, pl_module: L.LightningModule, checkpoint: Mapping[str, Any], had_adapters: bool) -> None:
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if self.recovering.prepare(pl_module, self.run.life, state, had_adapters=had_adapters) and state is not None:
            self.run.recovers_from = state["recovers_from"]
