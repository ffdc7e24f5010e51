"""What stands between a gradient and the optimizer: the loss scale of float16 training, and clipping."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import lightning as L
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from zssvd_lightning.targets import Target


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

    def __enter__(self) -> Self:
        if self._scaler is not None:
            self._scaler.step, self._scaler.update = self._step, self._update
        return self

    def __exit__(self, *_: object) -> None:
        if self._scaler is not None:
            del self._scaler.step, self._scaler.update

    def _step(self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> None:
        """Steps nothing."""

    def _update(self, new_scale: float | None = None) -> None:
        scale = self._scaler.get_scale() * (self._scaler.get_backoff_factor() if self.overflowed else 1.0)
        type(self._scaler).update(self._scaler, scale if new_scale is None else new_scale)


@contextmanager
def nothing_to_clip(module: L.LightningModule) -> Iterator[None]:
    """Keeps gradients from being clipped where they have been taken away, which clipping by value does not stand."""
    before = module.__dict__.get("configure_gradient_clipping")
    module.__dict__["configure_gradient_clipping"] = lambda *_, **__: None
    try:
        yield
    finally:
        del module.__dict__["configure_gradient_clipping"]
        if before is not None:
            module.__dict__["configure_gradient_clipping"] = before
