"""What stands between a gradient and the optimizer: the loss scale of float16 training, and clipping."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Self

import lightning as L
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from zssvd_lightning._contexts import overridden
from zssvd_lightning.model.targets import Target


def loss_scale(trainer: L.Trainer) -> float:
    """What losses are multiplied by before backward; 1 unless the run is of precision `16-mixed`."""
    return float(trainer.precision_plugin.scaler.get_scale()) if scales(trainer) else 1.0  # type: ignore[attr-defined]


def scales(trainer: L.Trainer) -> bool:
    """Whether the run multiplies its losses, so that gradients may overflow."""
    plugin = trainer.precision_plugin
    return isinstance(plugin, MixedPrecision) and plugin.scaler is not None


def unscale(trainer: L.Trainer, optimizer: torch.optim.Optimizer | None, targets: Iterable[Target]) -> bool:
    """Takes the loss scale off the gradients that Lightning has not taken it off.

    Args:
        trainer: whose loss scale it is.
        optimizer: the one whose step Lightning is about to take; None when it takes none.
        targets: layers with gradients.

    Returns:
        Whether all are finite, which without a loss scale is left to be found out at truncation.
    """
    if not scales(trainer):
        return True
    scale, unscaled = loss_scale(trainer), set()
    if optimizer is not None and not getattr(optimizer, "_step_supports_amp_scaling", False):  # as fused ones do
        unscaled = {id(p) for group in optimizer.param_groups for p in group["params"]}
    finite = True
    for target in targets:
        weight = target.module.weight
        if weight.grad is not None:
            if id(weight) not in unscaled:
                weight.grad.div_(scale)
            finite = finite and bool(weight.grad.isfinite().all())
    return finite


class ScalerAtRest:
    """Stands in for a gradient scaler's step and update, which need gradients, while there are none.

    The loss scale stays, or falls as it does after an overflow.

    Args:
        trainer: whose scaler it is; without one nothing is done.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        self._scaler: Any = trainer.precision_plugin.scaler if scales(trainer) else None  # type: ignore[attr-defined]
        self.overflowed = False

    @contextmanager
    def resting(self) -> Iterator[Self]:
        """The scaler does nothing of its own within the block."""
        if self._scaler is None:
            yield self
            return
        with overridden(self._scaler, step=self._step, update=self._update):
            yield self

    def _step(self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> None:
        """Steps nothing."""

    def _update(self, new_scale: float | None = None) -> None:
        scale = self._scaler.get_scale() * (self._scaler.get_backoff_factor() if self.overflowed else 1.0)
        type(self._scaler).update(self._scaler, scale if new_scale is None else new_scale)


def nothing_to_clip(module: L.LightningModule) -> AbstractContextManager[None]:
    """Keeps gradients from being clipped where they have been taken away, which clipping by value does not stand."""
    return overridden(module, configure_gradient_clipping=lambda *_, **__: None)
