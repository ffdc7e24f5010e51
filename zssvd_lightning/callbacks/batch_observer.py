"""Observation of batches: handling of the loss and its gradients in the hooks of the callback."""

import logging
import math
from typing import Any

import lightning as L
import torch
from torch import Tensor

from zssvd_lightning.calibration.batches import refuse_malformed, refuse_square
from zssvd_lightning.calibration.masks import mask_of
from zssvd_lightning.callbacks.batch_meaning import BatchMeaning
from zssvd_lightning.callbacks.fit_context import FitContext
from zssvd_lightning.callbacks.lifecycle import Lifecycle
from zssvd_lightning.callbacks.trainer import telemetry
from zssvd_lightning.callbacks.trainer.precision import ScalerAtRest, loss_scale, nothing_to_clip, scales, unscale

logger = logging.getLogger(__name__)


class BatchObserver:
    """Observer that gathers statistics from the batches of a fit.

    Args:
        fit: context of the run.
        meaning: the callback, which interprets batches.
    """

    def __init__(self, fit: FitContext, meaning: BatchMeaning) -> None:
        self._fit, self._meaning = fit, meaning
        self._scaler: ScalerAtRest | None = None

    def start_batch(self, trainer: L.Trainer, module: L.LightningModule, life: Lifecycle, batch: Any) -> None:
        """Start to observe the batch, if the current phase gathers statistics."""
        if life.gathering:
            refuse_malformed(batch, life.batches + 1)
            mask = mask_of(batch, self._meaning.token_mask)
            refuse_square(module, mask.positions, life.batches + 1)
            self._fit.adapter.unwrap_parameters()
            self._fit.adapter.before_batch()
            observed = life.open(mask, self._meaning.loss_terms(batch))
            self._fit.adapter.sync_requires_grad()
            observed.during(nothing_to_clip(module))
            self._scaler = observed.during(ScalerAtRest(trainer).resting())
            if life.keeps_back(trainer.num_training_batches):
                observed.keep(batch)

    def weigh_loss(self, trainer: L.Trainer, life: Lifecycle, loss: Tensor) -> None:
        """Record the loss, and scale its gradient from that of a mean to that of a sum over its terms.

        Lightning divides the loss by the accumulation factor and, in fp16, multiplies it by the loss scale. The scaled
        gradient keeps the loss scale and is relative to the number of terms of the first batch, so that it does not
        overflow.
        """
        accumulate = trainer.accumulate_grad_batches
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

    def complete_batch(self, life: Lifecycle) -> None:
        """Record that the loss and the gradients of the batch are complete."""
        if life.batch is not None:
            life.batch.complete = True
            life.batch.keep_back(life.compression.safeguard)

    def take_gradients(self, trainer: L.Trainer, life: Lifecycle, optimizer: torch.optim.Optimizer) -> None:
        """Collect the gradients of the accumulation window before clipping, and clear them for the optimizer."""
        if life.first_losses:
            losses = math.fsum(life.first_losses) / len(life.first_losses)
            everywhere = self._fit.adapter.team.gathered(losses)
            telemetry.log(trainer, self._fit.turn.prefix, loss_after=math.fsum(everywhere) / len(everywhere))
            life.first_losses = None
        if life.batch is not None:
            self._collect(trainer, life, optimizer)
            optimizer.zero_grad(set_to_none=True)
            life.batch.stepped = True

    def take_gradients_without_step(self, trainer: L.Trainer, life: Lifecycle) -> None:
        """Collect gradients that no step follows, for instance because an overridden `optimizer_step` skips steps."""
        if life.gathering and life.compression.gathering.pending:
            self._collect(trainer, life, None)

    def _collect(self, trainer: L.Trainer, life: Lifecycle, optimizer: torch.optim.Optimizer | None) -> None:
        """Collect the current gradients. `optimizer` is the one about to step, or None if no step follows."""
        compression, unit = life.compression, life.reference_terms
        self._fit.adapter.unwrap_parameters()
        finite = unscale(trainer, optimizer, compression.targets.values())
        if scales(trainer):
            finite = all(compression.team.gathered(finite))
        if unit is not None and finite:
            compression.gathering.collect_gradients(unit)
            return
        logger.warning("gradients overflowed in float16; their batches are not counted and the loss scale drops")
        compression.gathering.discard_gradients()
        if self._scaler is not None:
            self._scaler.overflowed = True
