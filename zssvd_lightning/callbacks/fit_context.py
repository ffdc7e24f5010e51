"""What one run of a Trainer lends to the callback, and is given back on any exit."""

import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any, TypeVar

import lightning as L

from zssvd_lightning.callbacks.trainer.checkpoint_hooks import borrowed_checkpoint_hooks
from zssvd_lightning.callbacks.trainer.limits import ExtendedLimits, batch_is_over
from zssvd_lightning.strategies import StrategyAdapter, adapter_for

Entered = TypeVar("Entered")


class FitContext:
    """The Trainer of the run, the adapter of its strategy, and everything that is overridden for as long as it lasts.

    Attributes:
        fitting: the run is a fit, and no validation, test or prediction.
        resumed: the state of a checkpoint was loaded in this run.
        limits: steps and epochs that the Trainer's limits were raised by.
    """

    def __init__(self) -> None:
        self.fitting, self.resumed = True, False
        self.limits = ExtendedLimits()
        self._borrowed = ExitStack()
        self._trainer: weakref.ref[L.Trainer] | None = None
        self._adapter: StrategyAdapter | None = None

    @property
    def adapter(self) -> StrategyAdapter:
        """Adapter of the run's strategy. Raises RuntimeError before `setup`."""
        if self._adapter is None:
            raise RuntimeError("the strategy of the run is known from setup on")
        return self._adapter

    @property
    def in_this_process(self) -> bool:
        """True once `setup` has run here; a launcher may run it in other processes alone."""
        return self._adapter is not None

    @property
    def trainer(self) -> L.Trainer | None:
        """The Trainer of the run, while it lives."""
        return None if self._trainer is None else self._trainer()

    @property
    def batch_is_over(self) -> bool:
        """True if Lightning would not run the latest batch again after a restart."""
        return self.trainer is None or batch_is_over(self.trainer)

    def open(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Enter a run; what an earlier one borrowed is given back."""
        self.close()
        self._trainer, self.fitting, self.resumed = weakref.ref(trainer), stage == "fit", False
        self._adapter = adapter_for(trainer, module)

    def follow_checkpoints(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        check: Callable[[Mapping[str, Any]], None],
        prepared: Callable[[Mapping[str, Any], bool], None],
        state_key: str,
    ) -> None:
        """Have the module's structure follow the checkpoints it loads, until the context is closed.

        Args:
            trainer: the Trainer of the run.
            module: the module it runs.
            check: called with every checkpoint before it is loaded; raises when it must not be.
            prepared: called with it once the structure is its own, and whether there were adapters before.
            state_key: key of the callback's state in it.
        """
        loaded = self.borrow(borrowed_checkpoint_hooks(module, check, self.adapter.replace, prepared))
        self.borrow(self.adapter.checkpoints(loaded, state_key))
        self.on_close(lambda: self.limits.take_back(trainer))

    def borrow(self, context: AbstractContextManager[Entered]) -> Entered:
        """Enter a context that lasts until `close`."""
        return self._borrowed.enter_context(context)

    def on_close(self, call: Callable[[], object]) -> None:
        """Call a function on `close`."""
        self._borrowed.callback(call)

    def close(self) -> None:
        """Give everything back that was borrowed."""
        self._borrowed.close()

    def take_up_limits(self, trainer: L.Trainer, state: Mapping[str, Any]) -> None:
        """Raise the Trainer's limits as they were when the state was saved; a second call changes nothing."""
        self.limits.take_back(trainer)
        self.limits = ExtendedLimits(**state["allowance"])
        self.limits.grant(trainer)

    def give_up_limits(self) -> None:
        """Give the Trainer its own limits again."""
        if self.trainer is not None:
            self.limits.take_back(self.trainer)
        self.limits = ExtendedLimits()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy, or another process, gets: nothing of the run under way."""
        return self.__dict__ | {"_trainer": None, "_adapter": None, "_borrowed": ExitStack()}
