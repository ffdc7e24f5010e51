"""Recovery `frugal`: trains the factors by Adafactor, whose state takes `m + k` numbers for a factor of `m k`."""

from dataclasses import dataclass

import torch

from zssvd_lightning import FactorRecovery
from zssvd_lightning.recovery.methods import METHODS


@dataclass(frozen=True)
class FrugalRecovery(FactorRecovery):
    """Training of factors in little memory, with a learning rate that falls on a line."""

    method = "frugal"
    clip: float = 1.0
    """Largest root mean square of an update, 1 or more."""

    def optimizer(self, parameters, steps):
        """Return the optimizer and its schedule, as `configure_optimizers` does."""
        optimizer = torch.optim.Adafactor(parameters, lr=self.lr, d=self.clip, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=int(min(steps, 1e9)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


METHODS.register("frugal", FrugalRecovery)
