"""Replacement of the loss that the training step of a module returns."""

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import lightning as L
from torch import Tensor

from zssvd_lightning._contexts import overridden

Change = Callable[[Tensor, Any], Tensor]
"""Function that takes a loss and its batch and returns the loss to train on."""


def changed_loss(module: L.LightningModule, change: Change) -> AbstractContextManager[None]:
    """Return a context in which `module.training_step` returns `change(loss, batch)` in place of its loss.

    A step that returns no loss is not changed.
    """
    return overridden(module, training_step=_ChangedStep(module.training_step, change))


class _ChangedStep:
    """Training step with a changed loss."""

    def __init__(self, own: Callable[..., Any], change: Change) -> None:
        functools.update_wrapper(self, own)  # Lightning inspects the signature
        self.own = own
        self.change = change

    def __reduce__(self) -> Any:
        """Copy and pickle the original step without the change, which applies only to the current training."""
        return _itself, (self.own,)

    def __call__(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        output = self.own(batch, *args, **kwargs)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            return output
        changed = self.change(loss, batch)
        return {**output, "loss": changed} if isinstance(output, Mapping) else changed


def _itself(step: Callable[..., Any]) -> Callable[..., Any]:
    return step
