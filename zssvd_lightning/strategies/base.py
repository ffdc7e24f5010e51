"""Interface between compression and a strategy, and the adapter for a single device."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from torch import Tensor, nn

from zssvd_lightning.config.compression import CompressionConfig
from zssvd_lightning.distributed import Team
from zssvd_lightning.model.dense_copy import copied
from zssvd_lightning.model.replace import replace_module
from zssvd_lightning.model.targets import Target, local_part


class StrategyAdapter:
    """Adapter between compression and one strategy, for one run of a Trainer.

    The default methods suit a single unwrapped module: most of them do nothing.

    Args:
        trainer: the Trainer; its processes have started.
        module: the module that the Trainer runs.
    """

    serves: ClassVar[tuple[type[Strategy], ...]] = ()
    """Strategies that the adapter supports, including their subclasses."""

    compresses_again: ClassVar[bool] = False
    """True if low-rank layers can be made dense during the compression, without setting up the strategy anew."""

    def __init__(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.trainer = trainer
        self.module = module

    @cached_property
    def team(self) -> Team:
        """Team of processes; available once the model is set up."""
        return Team()

    def refuse_unsupported(self) -> None:
        """Raise UnsupportedTrainingError for strategy settings under which a model cannot be compressed."""

    def refuse_settings(self, config: CompressionConfig) -> None:
        """Raise UnsupportedTrainingError for settings that do not work with layers split over the processes."""

    def parks(self, setting: bool | str) -> bool | str:
        """Return the setting `park_optimizer` to follow. Raises UnsupportedTrainingError if True is impossible."""
        return setting

    def refuse_layers(self, targets: Mapping[str, Target]) -> None:
        """Raise UnsupportedTrainingError if layers are laid out over the processes in an unsupported way."""

    def unwrap_parameters(self) -> None:
        """Make the module's parameters the ones that optimizers and `team` use, at any moment of the training."""

    def before_batch(self) -> None:
        """Prepare the module so that the gradients of the next batch have the form that `team` expects."""

    def sync_requires_grad(self) -> None:
        """Update the strategy after `requires_grad` flags of parameters have changed."""

    def replace(self, model: nn.Module, old: nn.Module, new: nn.Module) -> None:
        """Put `new` in place of `old`; a second call can undo it."""
        replace_module(model, old, new)

    def dense_copy(self, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        """Return a dense copy of `model` for predictions only, laid out over the processes like `model`. Collective.

        The dense layers that stand for compressed ones have no values yet.

        Args:
            model: the model to copy.
            dtype: floating-point type of the copy.
        """
        copy = copied(model, dtype, lambda parameter: parameter.to(dtype, copy=True))
        device = next(model.parameters()).device
        for part in copy.modules():
            if any(parameter.is_meta for parameter in part.parameters(recurse=False)):
                part.to_empty(device=device, recurse=False)
        return copy

    def whole(self, parameter: Tensor) -> Tensor:
        """Return a whole parameter as a plain tensor. Collective."""
        return self.team.whole(local_part(parameter.detach()), len(parameter))

    @property
    def processes_of_a_copy(self) -> int:
        """Number of processes that share one `dense_copy`."""
        return 1

    @property
    def state_bytes(self) -> int:
        """Bytes of the state of the optimizers on the device of the model, in this process."""
        device = next(self.module.parameters()).device
        tensors = {
            id(value): value
            for optimizer in self.trainer.optimizers
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor) and value.device == device
        }
        return sum(local_part(tensor).nbytes for tensor in tensors.values())

    @property
    def trained_bytes(self) -> int:
        """Bytes of the parameters that are trained, in this process."""
        return sum(local_part(each).nbytes for each in self.module.parameters() if each.requires_grad)

    def rebuild_optimizers(self) -> None:
        """Set up the strategy and new optimizers for the current layers of the module. Collective."""
        self.trainer.strategy.setup_optimizers(self.trainer)

    def discard_replaced(self) -> None:
        """Discard the state kept for undoing layer replacements."""

    def checkpoints(self, prepare: Callable[[Mapping[str, Any]], None], key: str) -> AbstractContextManager[None]:
        """Return a context in which checkpoints are saved and loaded in the form that `team` uses.

        Needed for strategies that save and load checkpoints without the hooks of the module.

        Args:
            prepare: function called before the strategy loads a checkpoint, with a checkpoint that has only the names
                and shapes of its weights.
            key: key of the compression state among the callback states of a checkpoint.
        """
        return nullcontext()


class SingleDeviceAdapter(StrategyAdapter):
    """Adapter for an unwrapped module on one device."""

    serves = (SingleDeviceStrategy,)
    compresses_again = True
