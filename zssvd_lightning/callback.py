"""When things happen inside a training run. What happens is in `compression.py`, the phases are in `phase.py`.

| hook                     | what is done there                                                               |
|--------------------------|----------------------------------------------------------------------------------|
| on_train_start           | is the run of a kind that can be compressed, and long enough?                    |
| on_train_batch_start     | the set point is looked for; a calibration batch comes under observation         |
| on_before_backward       | its loss is checked, and its gradient weighted by the terms the loss averages    |
| on_before_optimizer_step | gradients are taken away, so the user's optimizer has nothing to step on         |
| on_train_batch_end       | observation ends; when enough was seen, the next phase is entered                |
| on_train_epoch_end       | the same, for loaders that do not tell their length                              |
| on_exception             | everything is put back, unless the model was factorised already                  |
"""

import logging
import math
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from zssvd_lightning.calibration import Observation, loss_terms, token_mask
from zssvd_lightning.compression import Compression
from zssvd_lightning.config import CompressionConfig, require
from zssvd_lightning.errors import UnfinishedError, UnsupportedTrainingError
from zssvd_lightning.guards import refuse_stale_groups, refuse_too_short, refuse_unsupported, window_end
from zssvd_lightning.phase import Phase
from zssvd_lightning.precision import loss_scale, unscale
from zssvd_lightning.report import Report

logger = logging.getLogger(__name__)


class ZSSVDCallback(L.Callback):
    """Compresses the model in the middle of `trainer.fit` by Zero Sum SVD (arXiv 2602.02848).

    Works on any `LightningModule` with automatic optimization and one optimizer whose `training_step` returns a loss
    that is a mean. During calibration dropout is off, no weight changes and the optimizer keeps its state, but the
    batches count as steps for `max_steps` and schedulers. After factorisation `configure_optimizers` runs again, so
    the learning-rate schedule starts with the training of the factors.

    Args:
        prune_ratio: fraction of the target layers' parameters to remove, in (0, 1).
        start_epoch: compression starts no earlier than this epoch (from 0).
        start_step: compression starts no earlier than this global step; both set points must be reached.
        calibration_epochs: calibration ends after as many batches as so many passes over the training data hold, ...
        calibration_batches: ... or after so many batches, whichever is less, with the accumulation window they end in.
        corrections: projected gradient steps, each followed by fresh statistics and a new truncation.
        correction_batches: batches whose mean gradient a projected step follows.
        line_search: take only the part of each step at which the loss is estimated to be least, from as many batches
            again; without, all of it, as the paper does.
        metric: `input` (whitened by the input second moment) or `none` (plain SVD).
        selection: `zero_sum`, `abs_delta`, `abs_delta_unordered`, `most_negative`, `sigma` or `uniform`.
        min_rank_fraction: rank floor of each matrix, as a fraction of its break-even rank.
        include: name patterns of the layers to compress (`q_proj`, `*.layers.3.*`, or `re:` and a regular
            expression); all linear layers when None.
        ignore: name patterns of layers to leave alone.
        progress: whether to draw a progress bar while spectra are computed.

    Attributes:
        phase: where the compression stands, a `Phase`.
        report: what was done, from FACTORISE on; None before.

    Raises:
        ConfigError: an argument is out of range.
        UnsupportedTrainingError: at the start of `fit`, when it is of a kind that cannot be compressed in or is too
            short.
        TargetError: at the start of `fit`, when there is nothing to compress.
        CalibrationError: during `fit`, when batches do not give the statistics needed. The model is then put back.
        UnfinishedError: at the end of `fit`, when training stopped before the model was factorised.

    Example:
        >>> trainer = L.Trainer(max_epochs=3, callbacks=[ZSSVDCallback(prune_ratio=0.4)])  # doctest: +SKIP
    """

    def __init__(
        self,
        prune_ratio: float = 0.2,
        *,
        start_epoch: int = 0,
        start_step: int = 0,
        calibration_epochs: int = 1,
        calibration_batches: int = 128,
        corrections: int = 1,
        correction_batches: int = 8,
        line_search: bool = True,
        metric: str = "input",
        selection: str = "zero_sum",
        min_rank_fraction: float = 0.0,
        include: Sequence[str] | str | None = None,
        ignore: Sequence[str] | str | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__()
        require(start_epoch >= 0, "start_epoch", start_epoch, "0 or more")
        require(start_step >= 0, "start_step", start_step, "0 or more")
        require(calibration_epochs >= 1, "calibration_epochs", calibration_epochs, "1 or more")
        require(calibration_batches >= 1, "calibration_batches", calibration_batches, "1 or more")
        self.config = CompressionConfig(
            prune_ratio=prune_ratio,
            metric=metric,
            selection=selection,
            corrections=corrections,
            correction_batches=correction_batches,
            line_search=line_search,
            min_rank_fraction=min_rank_fraction,
            include=_patterns(include),
            ignore=_patterns(ignore),
        )
        self.start_epoch = start_epoch
        self.start_step = start_step
        self.calibration_epochs = calibration_epochs
        self.calibration_batches = calibration_batches
        self.progress = progress
        self.phase = Phase.WAIT
        self.report: Report | None = None
        self._compression: Compression | None = None
        self._batch: _ObservedBatch | None = None
        self._corrected = 0
        self._at_step_end = False
        self._terms_unit: float | None = None
        self._batches_into_epoch = 0
        self._epoch_length = math.inf
        self._compressed: weakref.ref[L.LightningModule] | None = None

    def token_mask(self, batch: Any) -> Tensor | None:
        """Which positions (B, T) of a batch are not padding. Override for batches without an `attention_mask`."""
        return token_mask(batch)

    def loss_terms(self, batch: Any) -> float:
        """How many terms the mean loss of a batch runs over. Override for batches without `labels`."""
        return loss_terms(batch)

    def batches_needed(self, batches_per_epoch: float = math.inf, accumulate: int = 1) -> int:
        """Training batches from the start of an epoch until the model is factorised."""
        done = 0
        correction = [Phase.CORRECT] * (1 + self.config.line_search) + [Phase.CALIBRATE]
        for phase in [Phase.CALIBRATE] + correction * self.config.corrections:
            done = window_end(done + self._limit(phase, batches_per_epoch), batches_per_epoch, accumulate)
        return done

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuses runs that cannot be compressed in, before any batch is spent."""
        if self.phase is Phase.DONE and self._compressed is not None and self._compressed() is not pl_module:
            self._abandon()
            self.report = None
        if self.phase is not Phase.WAIT:
            return
        self._epoch_length = math.inf
        refuse_unsupported(trainer, pl_module)
        refuse_stale_groups(trainer, pl_module)
        refuse_too_short(
            trainer,
            self.start_epoch,
            self.start_step,
            self.batches_needed(trainer.num_training_batches, trainer.accumulate_grad_batches),
        )
        self._compression = Compression(pl_module, self.config, self.progress)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Puts the batch under observation, once the set point is reached and until enough was seen."""
        started = trainer.current_epoch >= self.start_epoch and trainer.global_step >= self.start_step
        if self.phase is Phase.WAIT and started:
            self.phase = Phase.CALIBRATE
        if self.phase in (Phase.CALIBRATE, Phase.CORRECT):
            self._drop_open_batch()
            compression = self._running
            self._batch = _ObservedBatch(compression, self.phase, self.loss_terms(batch), self.token_mask(batch))
            self._terms_unit = self._terms_unit or self._batch.terms

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Notes the loss and turns its gradient from a mean into a sum over its terms.

        Lightning has divided the loss by the accumulation factor and, in fp16, multiplied it by the loss scale; the
        weights keep the scale and are relative to the first batch's terms, so that no gradient overflows.
        """
        if self._batch is None or self._terms_unit is None:
            return
        self._batch.observation.forward_done()
        accumulate = trainer.accumulate_grad_batches
        self._running.add_loss(loss * (accumulate / loss_scale(trainer)), self._batch.terms)
        weight = self._batch.terms * accumulate / self._terms_unit
        if weight != 1.0:
            loss.register_hook(lambda gradient: gradient * weight)  # type: ignore[no-untyped-call]

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Takes the gradients of the accumulation window, before clipping, and leaves the optimizer none."""
        if self._batch is None or self._terms_unit is None:
            return
        if unscale(trainer, optimizer, self._running.targets.values()):
            self._running.collect_gradients(self._terms_unit)
        else:
            logger.warning("gradients overflowed in float16; their batches are not counted and the loss scale drops")
            self._running.discard_gradients()
        optimizer.zero_grad(set_to_none=True)
        self._batch.stepped = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Ends the observation and, when enough was seen and the accumulation window is closed, goes on."""
        self._batches_into_epoch = batch_idx + 1
        if self._batch is None:
            return
        observed, self._batch = self._batch, None
        observed.close()
        if observed.stepped:
            self._advance_if_enough(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes how long an epoch is, which a loader without a length does not tell before, and goes on if enough."""
        self._drop_open_batch()
        self._epoch_length = self._batches_into_epoch
        if self.phase in (Phase.CALIBRATE, Phase.CORRECT):
            self._advance_if_enough(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Declares the work done. Raises UnfinishedError, with the model put back, when it is not."""
        if self.phase is Phase.RECOVER:
            self.phase = Phase.DONE
        elif self.phase is not Phase.DONE:
            phase, seen = self.phase, self._compression.moments.batches if self._compression else 0
            self._abandon()
            raise UnfinishedError(
                f"training ended in phase {phase!r} after {seen} of its batches, before the model was factorised, and "
                "the model was put back; train longer, start earlier, or lower calibration_batches or corrections"
            )

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Puts everything back, unless the model was factorised already."""
        if self._batch is not None:
            self._drop_open_batch()
            for parameter in pl_module.parameters():
                parameter.grad = None
        if self.phase not in (Phase.RECOVER, Phase.DONE):
            self._abandon()

    def state_dict(self) -> dict[str, Any]:
        """The phase, so that a checkpoint is not resumed from where that would go wrong."""
        return {"phase": self.phase.value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the phase of a checkpoint. Raises UnsupportedTrainingError in the middle of a compression."""
        phase = Phase(state_dict["phase"])
        if phase not in (Phase.WAIT, Phase.RECOVER, Phase.DONE):
            raise UnsupportedTrainingError(
                f"the checkpoint was taken in phase {phase.value!r}, and its statistics and original weights were not "
                "saved; resume from a checkpoint of before the compression, or start it again"
            )
        self.phase = phase

    def _drop_open_batch(self) -> None:
        """Ends an observation whose batch was given up, by an error or by a hook that skipped it."""
        if self._batch is not None:
            self._batch.close()
            self._batch = None

    @property
    def _running(self) -> Compression:
        if self._compression is None:
            raise RuntimeError(f"phase {self.phase!r} without on_train_start before it")
        return self._compression

    def _limit(self, phase: Phase, batches_per_epoch: float) -> int:
        if phase is Phase.CORRECT:
            return self.config.correction_batches
        return int(min(self.calibration_batches, self.calibration_epochs * batches_per_epoch))

    def _advance_if_enough(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        batches_per_epoch = min(trainer.num_training_batches, self._epoch_length)
        if self._running.moments.batches >= self._limit(self.phase, batches_per_epoch):
            self._terms_unit = None
            self._advance(trainer, pl_module)

    def _advance(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leaves CALIBRATE or CORRECT for what comes next."""
        if self.phase is Phase.CORRECT and not self._at_step_end:
            self._running.correct()
            self._at_step_end = self.config.line_search
            if self._at_step_end:
                return
        if self.phase is Phase.CORRECT:
            if self._at_step_end:
                self._running.shorten_step()
            self._at_step_end = False
            self._corrected += 1
            self.phase = Phase.CALIBRATE
            return
        self.phase = Phase.TRUNCATE
        self._running.truncate()
        if self._corrected < self.config.corrections:
            self.phase = Phase.CORRECT
            return
        self.phase = Phase.FACTORISE
        self._factorise(trainer, pl_module)
        self.phase = Phase.RECOVER

    def _factorise(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._running.factorise()
        with self._running.stopwatch("factorise"):
            trainer.strategy.setup_optimizers(trainer)
        refuse_stale_groups(trainer, pl_module)
        self.report = self._running.report()
        self.report.config = {"compression": asdict(self.config)}
        self._compressed = weakref.ref(pl_module)
        self._compression = None

    def _abandon(self) -> None:
        if self._compression is not None:
            self._compression.restore()
        self._compression, self._terms_unit = None, None
        self._corrected, self._at_step_end = 0, False
        self.phase = Phase.WAIT


class _ObservedBatch:
    """A training batch between its first and its last hook."""

    def __init__(self, compression: Compression, phase: Phase, terms: float, mask: Tensor | None) -> None:
        self.terms = terms
        self.stepped = False
        with ExitStack() as stack:
            stack.enter_context(compression.stopwatch(phase.value))
            self.observation: Observation = stack.enter_context(
                compression.observing(mask, inputs=phase is Phase.CALIBRATE)
            )
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Puts mode, flags, cache and hooks back."""
        self._stack.close()


def _patterns(given: Sequence[str] | str | None) -> list[str] | None:
    return None if given is None else [given] if isinstance(given, str) else list(given)
