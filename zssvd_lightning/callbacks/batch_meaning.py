"""What the parts of the callback ask it about batches and the model; users override the methods in a subclass."""

from typing import Any, Protocol

import lightning as L
from torch import Tensor, nn


class BatchMeaning(Protocol):
    """The methods of `ZSSVDCallback` that say what a batch means."""

    def token_mask(self, batch: Any) -> Tensor | None:
        """Return the positions (B, T) of a batch that are not padding, or None for all."""

    def loss_terms(self, batch: Any) -> float:
        """Return the number of terms that the mean loss of a batch runs over."""

    def student(self, pl_module: L.LightningModule) -> nn.Module:
        """Return the model with the logits that the loss is of."""

    def batches_needed(self, batches_per_epoch: float = ..., accumulate: int = ...) -> int:
        """Return the training batches from the start of an epoch until factorization."""
