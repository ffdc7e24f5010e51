"""Interface to the methods of the callback that users override."""

from typing import Any, Protocol

import lightning as L
from torch import Tensor, nn


class BatchMeaning(Protocol):
    """Methods of `ZSSVDCallback` that interpret batches or measure the model. Users override them in a subclass."""

    def token_mask(self, batch: Any) -> Tensor | None:
        """Return the mask (B, T) of the positions of a batch that are not padding, or None."""

    def loss_terms(self, batch: Any) -> float:
        """Return the number of terms in the mean loss of a batch."""

    def student(self, pl_module: L.LightningModule) -> nn.Module:
        """Return the model whose logits the loss uses."""

    def batches_needed(self, batches_per_epoch: float = ..., accumulate: int = ..., start: int = ...) -> int:
        """Return the number of training batches from batch `start` of the fit until factorization."""

    def on_before_truncation(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the dense model right before its first truncation."""

    def on_compressed(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the low-rank model right after factorization."""
