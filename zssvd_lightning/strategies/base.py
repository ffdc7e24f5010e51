"""What a compression asks of a strategy, and the strategy that is asked for nothing."""

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
    """One strategy, for one run of a Trainer. Methods do what a single plain module needs: mostly nothing.

    Args:
        trainer: the Trainer, whose processes have started.
        module: the module it runs.
    """

    serves: ClassVar[tuple[type[Strategy], ...]] = ()
    """Strategies it is for, subclasses included."""

    def __init__(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.trainer = trainer
        self.module = module

    @cached_property
    def team(self) -> Team:
        """The processes, once the model is set up."""
        return Team()

    def refuse_unsupported(self) -> None:
        """Raises UnsupportedTrainingError for settings of the strategy that a model cannot be compressed under."""

    def refuse_settings(self, config: CompressionConfig) -> None:
        """Raises UnsupportedTrainingError for what cannot be done to layers as they are laid out over the processes."""

    def refuse_layers(self, targets: Mapping[str, Target]) -> None:
        """Raises UnsupportedTrainingError when layers are laid out over the processes in a way that is not known."""

    def unwrap_parameters(self) -> None:
        """Makes the module's parameters those that optimizers and `team` know, at whatever moment."""

    def before_batch(self) -> None:
        """Has the gradients of the next batch become what `team` expects them to be."""

    def sync_requires_grad(self) -> None:
        """Is called when parameters have begun to require gradients, or not to any more."""

    def replace(self, model: nn.Module, old: nn.Module, new: nn.Module) -> None:
        """Puts `new` in the place of `old`, which may be put back in the same way."""
        replace_module(model, old, new)

    def dense_copy(self, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        """A dense model like `model`, for its predictions alone, laid out over the processes as that is.

        Its compressed layers have no values yet. Collective.
        """
        copy = copied(model, dtype, lambda parameter: parameter.to(dtype, copy=True))
        device = next(model.parameters()).device
        for part in copy.modules():
            if any(parameter.is_meta for parameter in part.parameters(recurse=False)):
                part.to_empty(device=device, recurse=False)
        return copy

    def whole(self, parameter: Tensor) -> Tensor:
        """All of a parameter, as a plain tensor. Collective."""
        return self.team.whole(local_part(parameter.detach()), len(parameter))

    @property
    def processes_of_a_copy(self) -> int:
        """How many processes share a `dense_copy`."""
        return 1

    def rebuild_optimizers(self) -> None:
        """Makes the strategy and new optimizers go by the layers that the module has now. Collective."""
        self.trainer.strategy.setup_optimizers(self.trainer)

    def discard_replaced(self) -> None:
        """Replaced layers will not be put back."""

    def checkpoints(self, prepare: Callable[[Mapping[str, Any]], None], key: str) -> AbstractContextManager[None]:
        """Has checkpoints saved and loaded as `team` has them, where the strategy does it without the module's hooks.

        Args:
            prepare: is given a checkpoint, with names and shapes of weights alone, before the strategy loads it.
            key: under which the callbacks' part of a checkpoint has the state of the compression.
        """
        return nullcontext()


class SingleDeviceAdapter(StrategyAdapter):
    """A plain module on one device."""

    serves = (SingleDeviceStrategy,)
