"""Judgment of a recovery on held-out batches: the best state that it reaches, or its start, is the final one."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zssvd_lightning.errors import CheckpointError
from zssvd_lightning.model.targets import local_part

logger = logging.getLogger(__name__)


class Judge:
    """Comparison of the states of one recovery on batches that nothing else in the run sees.

    Args:
        measure: function that returns the mean loss of a batch and its number of terms at the present weights.
        batches: held-out batches, the same for all states.
        every: optimizer steps between two measurements.
        patience: number of measurements in a row without a better one after which training stops; None for no limit.

    Attributes:
        start: mean loss before the first step (nats); None before it was measured.
        best: lowest mean loss so far. `best_step` is the number of steps of the recovery after which it was measured.
        latest: mean loss at the latest measurement, after `steps` steps of the recovery.
    """

    def __init__(
        self,
        measure: Callable[[Any], tuple[float, float]],
        batches: Sequence[Any],
        every: int,
        patience: int | None,
    ) -> None:
        self.start: float | None = None
        self.best = math.inf
        self.latest = math.inf
        self.best_step = 0
        self.steps = 0
        self._measure, self._batches, self._every, self._patience = measure, batches, every, patience
        self._held: dict[str, Tensor] = {}
        self._worse = 0

    def check(self) -> None:
        """Measure all batches, so that batches that cannot be run fail before calibration."""
        self._loss()

    def begin(self, module: nn.Module) -> None:
        """Measure the state before the first step, and copy the parameters that require gradients."""
        self.start = self.best = self.latest = self._loss()
        self._keep(module)
        logger.info("loss on %d held-out batches before training: %.4f", len(self._batches), self.start)

    def is_due(self, steps: int) -> bool:
        """Return True if the state after so many steps of the recovery is to be measured."""
        return steps > self.steps and steps % self._every == 0

    def consider(self, module: nn.Module, steps: int) -> bool:
        """Measure the present state, and copy it if it is the best so far. Return False if training should stop."""
        self.latest, self.steps = self._loss(), steps
        better = self.latest < self.best
        self._worse = 0 if better else self._worse + 1
        if better:
            self.best, self.best_step = self.latest, steps
            self._keep(module)
        logger.info("loss on held-out batches after %d steps: %.4f (best: %.4f)", steps, self.latest, self.best)
        return self._patience is None or self._worse < self._patience

    @torch.no_grad()
    def settle(self, module: nn.Module, steps: int) -> None:
        """Measure the present state unless it was, and return to the best one."""
        if steps > self.steps:
            self.consider(module, steps)
        for name, value in _state_of(module):
            if name in self._held:
                value.copy_(self._held[name])
        self._worse = 0

    def go_on_from(self, module: nn.Module) -> None:
        """Copy the parameters that require gradients now, in a new stage that begins with the best state."""
        self._held = {}
        self._keep(module)

    def report(self) -> dict[str, float]:
        """Return the losses (nats) for the report, and the steps to the final state and of the whole training."""
        start = math.nan if self.start is None else self.start
        return {
            "batches": len(self._batches),
            "truncated": start,
            "recovered": self.best,
            "step": self.best_step,
            "steps": self.steps,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return plain types and tensors."""
        return {
            "batches": len(self._batches),
            "start": self.start,
            "best": self.best,
            "best_step": self.best_step,
            "steps": self.steps,
            "worse": self._worse,
            "held": dict(self._held),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a `state_dict`. Raises CheckpointError if it was saved with another number of batches."""
        if state["batches"] != len(self._batches):
            raise CheckpointError(
                f"the checkpoint is of a recovery judged on {state['batches']} held-out batches, and this callback has "
                f"{len(self._batches)}; pass the same held_out"
            )
        self.start, self.best, self.best_step = state["start"], state["best"], state["best_step"]
        self.steps, self._worse = state["steps"], state["worse"]
        self._held = {name: value.clone() for name, value in state["held"].items()}

    @torch.no_grad()
    def _keep(self, module: nn.Module) -> None:
        for name, value in _state_of(module):
            self._held.setdefault(name, torch.empty_like(value)).copy_(value)

    def _loss(self) -> float:
        """Return the mean loss over all terms of the held-out batches; infinite if it is NaN."""
        measured = [self._measure(batch) for batch in self._batches]
        mean = math.fsum(loss * terms for loss, terms in measured) / math.fsum(terms for _, terms in measured)
        return math.inf if math.isnan(mean) else mean


def _state_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield what training changes: parameters that require gradients, and running statistics of batch norms."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            yield name, local_part(parameter.detach())
    for place, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._NormBase):  # noqa: SLF001
            yield from ((f"{place}.{name}", buffer) for name, buffer in part.named_buffers(recurse=False))
