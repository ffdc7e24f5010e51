"""A change of one's own to the loss of somebody else's training step."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning as L
from torch import Tensor

Change = Callable[[Tensor, Any], Tensor]
"""From a loss and the batch it is of to the loss that is trained on."""


@contextmanager
def changed_loss(module: L.LightningModule, change: Change) -> Iterator[None]:
    """Within the context `module.training_step` returns `change(loss, batch)` in place of its loss.

    Several changes apply one after the other, and may end in any order. A step that returns no loss is left alone.
    """
    found = module.__dict__.get("training_step")
    step = found if isinstance(found, _ChangedStep) else _ChangedStep(module.training_step, found is not None)
    module.__dict__["training_step"] = step
    step.changes.append(change)
    try:
        yield
    finally:
        step.changes.remove(change)
        if not step.changes and module.__dict__.get("training_step") is step:
            del module.__dict__["training_step"]
            if step.was_set:
                module.__dict__["training_step"] = step.own


class _ChangedStep:
    """A training step with changes to its loss.

    Args:
        own: the step itself.
        was_set: whether it was an attribute of the module, not of its class.
    """

    def __init__(self, own: Callable[..., Any], was_set: bool) -> None:
        functools.update_wrapper(self, own)  # Lightning looks at the signature
        self.own = own
        self.was_set = was_set
        self.changes: list[Change] = []

    def __reduce__(self) -> Any:
        """Copies and pickles have no change: those end with the training they were made for."""
        return _ChangedStep, (self.own, self.was_set)

    def __call__(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        output = self.own(batch, *args, **kwargs)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            return output
        for change in self.changes:
            loss = change(loss, batch)
        return {**output, "loss": loss} if isinstance(output, Mapping) else loss
