"""The callback: what happens at each hook of a training run. Each hook hands it to the parts that do it.

| hook                     | what is done there                                                | by                   |
|--------------------------|-------------------------------------------------------------------|----------------------|
| setup                    | enter the run, follow its checkpoints, show the phase             | all parts            |
| teardown                 | merge adapters of a checkpoint, give back what was borrowed       | recovering, fit      |
| on_train_start           | refuse runs that cannot be compressed in, go on from a checkpoint | run, recovering      |
| on_train_batch_start     | look for the set point, observe a calibration batch               | run, observer        |
| on_before_backward       | check the loss, weight its gradient by its terms                  | recovering, observer |
| on_after_backward        | note that the batch is complete                                   | observer             |
| on_before_optimizer_step | take gradients from the optimizer, check those of recovery        | observer, recovering |
| on_before_zero_grad      | take gradients that no step follows                               | observer             |
| on_train_batch_end       | end the observation, enter the next phase or stage                | recovering, run      |
| on_train_epoch_end       | the same, for loaders that do not tell their length               | run                  |
| on_train_end             | declare the work done, or refuse to                               | run                  |
| on_fit_end               | merge adapters, put factors into 8 bits                           | recovering, run      |
| on_exception             | put everything back, unless the model was factorized              | all parts            |
| state_dict               | save the state of the compression                                 | run                  |
| load_state_dict          | take it up                                                        | run                  |
| on_load_checkpoint       | raise the Trainer's limits as they were                           | fit                  |
| on_save_checkpoint       | add the note for loads that know no low-rank layers               |                      |

How far the compression has come is in `lifecycle.py`, what is done to the model in `compression/`.
"""

import functools
import logging
import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self, Unpack

import lightning as L
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn

from zssvd_lightning.calibration.batches import loss_terms, token_mask
from zssvd_lightning.callbacks.batch_observer import BatchObserver
from zssvd_lightning.callbacks.compression_run import CompressionRun
from zssvd_lightning.callbacks.fit_context import FitContext
from zssvd_lightning.callbacks.lifecycle import Lifecycle
from zssvd_lightning.callbacks.recovery import RecoveryHooks
from zssvd_lightning.callbacks.schedule import CallbackSettings, Schedule, schedule_of
from zssvd_lightning.compression.phase import Phase
from zssvd_lightning.compression.quantization import in_8_bits_already
from zssvd_lightning.compression.report import Report
from zssvd_lightning.config.compression import CompressionConfig
from zssvd_lightning.errors import ConfigError
from zssvd_lightning.layers.storage import EIGHT_BIT
from zssvd_lightning.model.logits import model_with_logits
from zssvd_lightning.recovery.methods import recovery_of
from zssvd_lightning.recovery.settings import Recovery
from zssvd_lightning.serialization.state_dict import note
from zssvd_lightning.whitening.moments import Moments

logger = logging.getLogger(__name__)


class ZSSVDCallback(L.Callback):
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
        self.dry_run: bool | Path = dry_run if isinstance(dry_run, bool) else Path(dry_run)
        if dry_run is True and settings.get("plan") is not None:
            self.dry_run = Path(settings.pop("plan"))
            warnings.warn(
                "dry_run=True with plan=FILE is now dry_run=FILE; plan is a file to follow",
                DeprecationWarning,
                stacklevel=2,
            )
        self.config = CompressionConfig.of(preset, prune_ratio=prune_ratio, **settings)
        self.recovery = recovery_of(recovery)
        refuse_contradictions(self.config, self.recovery)
        super().__init__()
        self.fit = FitContext()
        self.recovering = RecoveryHooks(self.fit, self)
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
        recovery: Recovery | dict[str, Any] | None = None,
        dry_run: bool | str | Path = False,
        progress: bool = True,
    ) -> Self:
        """Return the callback of a `CompressionConfig`, as recipes have one; the rest is as for the class."""
        return cls(**asdict(config), schedule=schedule, recovery=recovery, dry_run=dry_run, progress=progress)

    @property
    def phase(self) -> Phase:
        """Where the compression stands."""
        return self.run.life.phase

    @property
    def report(self) -> Report | None:
        """What was done, from FACTORIZE on; None before."""
        return self.run.life.report

    @property
    def recovers_from(self) -> int | None:
        """Global step of this fit at which the factors began to train; None before."""
        return self.run.recovers_from

    @property
    def statistics(self) -> Moments:
        """Statistics of the stage under way. Raises RuntimeError when no compression is under way."""
        return self.run.life.compression.gathering.moments

    def token_mask(self, batch: Any) -> Tensor | None:
        """Return the positions (B, T) of a batch that are not padding, or None for all.

        Override it for batches without an `attention_mask`.
        """
        return token_mask(batch)

    def loss_terms(self, batch: Any) -> float:
        """Return the number of terms that the mean loss of a batch runs over.

        Override it for batches without `labels`.
        """
        return loss_terms(batch)

    def student(self, pl_module: L.LightningModule) -> nn.Module:
        """Return the model with the logits that the loss is of. Override it where that is not one of transformers."""
        return model_with_logits(pl_module)

    def batches_needed(self, batches_per_epoch: float = math.inf, accumulate: int = 1) -> int:
        """Return the training batches from the start of an epoch until the model is factorized."""
        return self.run.batches_needed(batches_per_epoch, accumulate)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Have the module's structure follow its checkpoints, and the progress bar show the phase."""
        self.fit.open(trainer, pl_module, stage)
        self.run.setup(trainer, pl_module)
        prepared = functools.partial(self._prepared, pl_module)
        self.fit.follow_checkpoints(trainer, pl_module, self._check, prepared, self.state_key)
        self.recovering.setup(trainer, pl_module, self._life)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give back what `setup` borrowed. Raises UnfinishedError when a fit ended without a batch of its own."""
        self.recovering.teardown(pl_module, stage)
        self.fit.close()
        if self.run.life.gathering and stage == "fit":
            self.run.give_up(pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse runs that cannot be compressed in, before any batch is spent; go on from a checkpoint."""
        if not self.run.go_on_after(pl_module):
            self.run.begin(trainer, pl_module)
            return
        if in_8_bits_already(pl_module):
            logger.warning("the layers are in 8 bits already; only what is beside their codes will be trained")
        self.recovering.resume(pl_module, self.run.life)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Observe the batch, once the set point is reached and until enough was seen."""
        self.recovering.start_batch(self.run.life)
        self.run.start_batch(trainer)
        self.observer.start_batch(trainer, pl_module, self.run.life, batch)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Note the loss and turn its gradient from a mean into a sum over its terms."""
        self.recovering.note_loss(trainer, self.run.life, loss)
        self.observer.weigh_loss(trainer, self.run.life, loss)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note that the batch has given its loss and its gradients."""
        self.observer.complete_batch(self.run.life)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Take the gradients of the accumulation window, before clipping, and leave the optimizer none."""
        self.observer.take_gradients(trainer, self.run.life, optimizer)
        self.recovering.check_step(trainer, pl_module, self.run.life)

    def on_before_zero_grad(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Take gradients that no step follows, as where `optimizer_step` is overridden to leave some out."""
        self.observer.take_gradients_without_step(trainer, self.run.life)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """End the observation and, when enough was seen and the accumulation window is closed, go on."""
        self.recovering.end_batch(trainer, pl_module, self.run.life)
        self.run.end_batch(trainer, pl_module, batch_idx)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note how long an epoch is, which a loader without a length does not tell before, and go on if enough."""
        self.run.end_epoch(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Declare the work done. Raises UnfinishedError, with the model put back, when it is not."""
        self.run.end_training(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Merge adapters, and put the trained factors into 8 bits if the storage is to have them."""
        self.recovering.finish(pl_module, self.run.life)
        self.run.quantize(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Put everything back, unless the model was factorized already."""
        self.run.leave_after_exception(pl_module)
        self.recovering.leave_after_exception(trainer, pl_module, self.run.life)
        self.teardown(trainer, pl_module, "fit" if self.fit.fitting else str(trainer.state.fn))

    def state_dict(self) -> dict[str, Any]:
        """Return the lifecycle and what it has taken of the training, as plain types and tensors."""
        return self.run.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state of a checkpoint, for a fit. Raises CheckpointError when it cannot."""
        self.run.load_state_dict(state_dict)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Raise the Trainer's limits as they were when the checkpoint was saved, before it compares with them."""
        if self.fit.fitting and (state := checkpoint["callbacks"].get(self.state_key)) is not None:
            self.fit.take_up_limits(trainer, state)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the note for loads that know nothing of low-rank layers, also after a run."""
        checkpoint["state_dict"].update(note(pl_module))

    def refuse_state(self, state: Mapping[str, Any]) -> None:
        """Raise CheckpointError for a callback state that this fit cannot go on from; nothing has been loaded then."""
        self.run.refuse_state(state)

    def _life(self) -> Lifecycle:
        return self.run.life

    def _check(self, checkpoint: Mapping[str, Any]) -> None:
        self.run.refuse_checkpoint(checkpoint, checkpoint.get("callbacks", {}).get(self.state_key))

    def _prepared(self, pl_module: L.LightningModule, checkpoint: Mapping[str, Any], had_adapters: bool) -> None:
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if self.recovering.prepare(pl_module, self.run.life, state, had_adapters=had_adapters) and state is not None:
            self.run.recovers_from = state["recovers_from"]


def refuse_contradictions(config: CompressionConfig, recovery: Recovery | None) -> None:
    """Raise ConfigError for a recovery that cannot train what the compression leaves."""
    if recovery is None:
        return
    recovery.refuse_storage(config.storage)
    if not recovery.merges and config.storage in EIGHT_BIT:
        raise ConfigError(f"storage {config.storage!r} needs merged factors; set recovery.merge to true")
    if recovery.rescales and config.weighs_rows:
        raise ConfigError(
            f"rows_in_16_bits 'loss_aware' goes by the scale of components, which recovery by "
            f"{recovery.method!r} changes; keep the 'last' rows, or recover by 'lora' or 'singular_values'"
        )
