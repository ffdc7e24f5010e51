"""Running batches again outside of the training loop, to compare losses."""

import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from copy import deepcopy
from typing import Any

import lightning as L
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from zssvd_lightning._contexts import overridden
from zssvd_lightning.calibration.contexts import measuring
from zssvd_lightning.callbacks.batch_meaning import BatchMeaning
from zssvd_lightning.errors import CalibrationError
from zssvd_lightning.strategies import StrategyAdapter

INDEX = 1
"""Index that batches are run again with: modules often do more for the first batch, such as logging pictures."""


class Replay:
    """Function that returns the loss of a batch at the present weights, and its number of terms.

    The training step runs in evaluation mode, without gradients and with the same random numbers each time. Its logging
    has no effect, and the module is restored; see `measuring`.

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
        batch = module.transfer_batch_to_device(copied(kept), module.device, 0)
        terms = float(meaning.loss_terms(batch))
        index = [INDEX] if is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2) else []
        with ExitStack() as stack:
            stack.enter_context(measuring(module))
            for part in module.modules():
                if isinstance(part, L.LightningModule):
                    stack.enter_context(overridden(part, log=_nothing, log_dict=_nothing))
            stack.callback(adapter.unwrap_parameters)
            output = trainer.strategy.training_step(batch, *index)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise CalibrationError("training_step gave no loss for a batch that is run again")
        return float(loss), terms


class _EndedReplay:
    """Replay of a fit that belongs to another process."""

    def __call__(self, kept: Any) -> tuple[float, float]:
        raise RuntimeError("the fit whose batches are run again is not in this process")


def copied(batch: Any) -> Any:
    """Return a copy of a batch on the CPU, which nothing can change in place."""
    return deepcopy(apply_to_collection(batch, Tensor, lambda tensor: tensor.detach().to("cpu")))


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Log nothing."""
