"""Running batches again outside of the training loop, to compare losses."""

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torchmetrics import Metric

from zssvd_lightning._contexts import evaluation_mode, no_cache, overridden, uncompiled
from zssvd_lightning.callbacks.batch_meaning import BatchMeaning
from zssvd_lightning.errors import CalibrationError
from zssvd_lightning.strategies import StrategyAdapter


class Replay:
    """Function that returns the loss of a batch at the present weights, and its number of terms.

    The training step runs in evaluation mode, without gradients and with the same random numbers each time. Its logging
    has no effect, and buffers and metrics of the module are restored.

    Args:
        trainer: the Trainer of the fit.
        module: the module that it trains.
        adapter: adapter for the strategy of the fit.
        meaning: the callback, which interprets batches.
    """

    def __init__(
        self, trainer: L.Trainer, module: L.LightningModule, adapter: StrategyAdapter, meaning: BatchMeaning
    ) -> None:
        self._trainer, self._module = weakref.ref(trainer), weakref.ref(module)
        self._adapter, self._meaning = weakref.ref(adapter), weakref.ref(meaning)

    def __reduce__(self) -> Any:
        """Leave the fit out of copies and other processes."""
        return _EndedReplay, ()

    def __call__(self, kept: Any) -> tuple[float, float]:
        """Return the mean loss of a batch on the CPU, and its number of terms."""
        trainer, module, adapter, meaning = self._trainer(), self._module(), self._adapter(), self._meaning()
        if trainer is None or module is None or adapter is None or meaning is None:
            raise RuntimeError("the fit whose batches are run again has ended")
        batch = trainer.strategy.batch_to_device(copied(kept, "cpu"), module.device, 0)
        index = {"batch_idx": 0} if is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2) else {}
        with _without_traces(module), torch.no_grad():
            try:
                output = trainer.strategy.training_step(batch, **index)
            finally:
                adapter.unwrap_parameters()
        loss = output.get("loss") if isinstance(output, dict) else output
        if not isinstance(loss, Tensor):
            raise CalibrationError("training_step gave no loss for a batch that is run again")
        return float(loss), float(meaning.loss_terms(batch))


class _EndedReplay:
    """Replay of a fit that belongs to another process."""

    def __call__(self, kept: Any) -> tuple[float, float]:
        raise RuntimeError("the fit whose batches are run again is not in this process")


def copied(batch: Any, device: str) -> Any:
    """Return a batch whose tensors are copies on a device, so that nothing can change them in place."""
    return apply_to_collection(batch, Tensor, lambda tensor: tensor.detach().to(device, copy=True))


@contextmanager
def _without_traces(module: L.LightningModule) -> Iterator[None]:
    """Evaluate the module without effects on logging, random numbers, buffers and metrics."""
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    metrics = [(metric, _state_of(metric)) for metric in module.modules() if isinstance(metric, Metric)]
    with ExitStack() as stack:
        for part in module.modules():
            if isinstance(part, L.LightningModule):
                stack.enter_context(overridden(part, log=_nothing, log_dict=_nothing))
        stack.enter_context(torch.random.fork_rng())
        torch.manual_seed(0)
        stack.enter_context(evaluation_mode(module))
        stack.enter_context(no_cache(module))
        stack.enter_context(uncompiled())
        try:
            yield
        finally:
            for buffer, before in buffers:
                buffer.copy_(before)
            for metric, state in metrics:
                metric.__dict__.update(state)


def _state_of(metric: Metric) -> dict[str, Any]:
    names = [*metric._defaults, "_computed", "_update_count"]  # noqa: SLF001
    return {name: deepcopy(metric.__dict__[name]) for name in names if name in metric.__dict__}


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Log nothing."""
