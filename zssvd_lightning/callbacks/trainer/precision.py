"""Handling of the loss scale of float16 training, and of gradient clipping."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Self

import lightning as L
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from zssvd_lightning._contexts import overridden
from zssvd_lightning.errors import ContradictionError
from zssvd_lightning.model.targets import Target


def loss_scale(trainer: L.Trainer) -> float:
    """Return the factor by which losses are multiplied before backward; 1 unless the precision is `16-mixed`."""
    return float(trainer.precision_plugin.scaler.get_scale()) if scales(trainer) else 1.0  # type: ignore[attr-defined]


def scales(trainer: L.Trainer) -> bool:
    """Return True if the run scales its losses, so that gradients may overflow."""
    plugin = trainer.precision_plugin
    return isinstance(plugin, MixedPrecision) and plugin.scaler is not None


def refuse_limits(trainer: L.Trainer, limits: Collection[str]) -> None:
    """Raise ContradictionError if a run with limits of memory, of these names, scales its losses."""
    if limits and scales(trainer):
        raise ContradictionError(
            f"with scaled gradients, statistics are held twice, which {' and '.join(limits)} does not count; train in "
            "bf16-mixed, or leave the limit out and set offload"
        )


def unscale(trainer: L.Trainer, optimizer: torch.optim.Optimizer | None, targets: Iterable[Target]) -> bool:
    """Divide gradients by the loss scale, unless Lightning has already done so.

    Args:
        trainer: the Trainer with the loss scale.
        optimizer: the optimizer that is about to step; None if no step follows.
        targets: layers with gradients.

    Returns:
        True if all gradients are finite. Without a loss scale always True; truncation checks the gradients then.
    """
    if not scales(trainer):
        return True
    scale, unscaled = loss_scale(trainer), set()
    if optimizer is not None and not getattr(optimizer, "_step_supports_amp_scaling", False):  # unlike fused optimizers
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
    """Replacement for the step and update of a gradient scaler while the optimizer has no gradients.

    Both need gradients. Meanwhile the loss scale stays the same, or decreases as usual after an overflow.

    Args:
        trainer: the Trainer with the scaler. Without a scaler, nothing is replaced.

    Attributes:
        overflowed: True if gradients have overflowed, so that the next update decreases the loss scale.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        self._scaler: Any = trainer.precision_plugin.scaler if scales(trainer) else None  # type: ignore[attr-defined]
        self.overflowed = False

    @contextmanager
    def resting(self) -> Iterator[Self]:
        """Replace the step and update of the scaler within the block."""
        if self._scaler is None:
            yield self
            return
        with overridden(self._scaler, step=self._step, update=self._update):
            yield self

    def _step(self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> None:
        """Skip the step."""

    def _update(self, new_scale: float | None = None) -> None:
        scale = self._scaler.get_scale() * (self._scaler.get_backoff_factor() if self.overflowed else 1.0)
        type(self._scaler).update(self._scaler, scale if new_scale is None else new_scale)


def nothing_to_clip(module: L.LightningModule) -> AbstractContextManager[None]:
    """Return a context without gradient clipping, because clipping by value fails without gradients."""
    return overridden(module, configure_gradient_clipping=lambda *_, **__: None)
