"""A change of one's own to the loss of somebody else's training step."""

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import lightning as L
from torch import Tensor

from zssvd_lightning._contexts import overridden

Change = Callable[[Tensor, Any], Tensor]
"""From a loss and the batch it is of to the loss that is trained on."""


def changed_loss(module: L.LightningModule, change: Change) -> AbstractContextManager[None]:
    """Within the context `module.training_step` returns `change(loss, batch)` in place of its loss.

    A step that returns no loss is left alone.
    """
    return overridden(module, training_step=_ChangedStep(module.training_step, change))


class _ChangedStep:
    """A training step with a change to its loss."""

    def __init__(self, own: Callable[..., Any], change: Change) -> None:
        functools.update_wrapper(self, own)  # Lightning looks at the signature
        self.own = own
        self.change = change

    def __reduce__(self) -> Any:
        """Copies and pickles have no change, which ends with the training it was made for."""
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
