"""Temporary overrides in one run of a Trainer, undone on any exit."""

import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any, TypeVar

import lightning as L

from zssvd_lightning.callbacks.several.turn import Turn
from zssvd_lightning.callbacks.trainer.checkpoint_hooks import borrowed_checkpoint_hooks
from zssvd_lightning.callbacks.trainer.limits import ExtendedLimits, batch_is_over
from zssvd_lightning.strategies import StrategyAdapter, adapter_for

Entered = TypeVar("Entered")


class FitContext:
    """Context of one run: its Trainer, the adapter of its strategy, and all temporary overrides.

    Attributes:
        fitting: True if the run is a fit; False for validation, test or prediction.
        resumed: True if the state of a checkpoint was loaded in this run.
        turn: place of the compression among those of its Trainer.
        limits: steps and epochs by which the Trainer's limits were raised.
    """

    def __init__(self) -> None:
        self.fitting, self.resumed = True, False
        self.turn = Turn()
        self.limits = ExtendedLimits()
        self._borrowed = ExitStack()
        self._trainer: weakref.ref[L.Trainer] | None = None
        self._adapter: StrategyAdapter | None = None

    @property
    def adapter(self) -> StrategyAdapter:
        """Adapter for the run's strategy. Raises RuntimeError before `setup`."""
        if self._adapter is None:
            raise RuntimeError("the strategy of the run is known from setup on")
        return self._adapter

    @property
    def in_this_process(self) -> bool:
        """True once `setup` has run in this process. A launcher may run it only in other processes."""
        return self._adapter is not None

    @property
    def trainer(self) -> L.Trainer | None:
        """Trainer of the run; None before the run or if the Trainer was deleted."""
        return None if self._trainer is None else self._trainer()

    @property
    def batch_is_over(self) -> bool:
        """True if Lightning would not repeat the latest batch after a restart."""
        return self.trainer is None or batch_is_over(self.trainer)

    def open(self, trainer: L.Trainer, module: L.LightningModule, stage: str, turn: Turn) -> None:
        """Enter a run, after undoing the overrides of an earlier run."""
        self.close()
        self.turn = turn
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
        """Make the module's structure follow the checkpoints it loads, until `close`.

        Args:
            trainer: the Trainer of the run.
            module: the module of the run.
            check: called with every checkpoint before it is loaded; raises to refuse the checkpoint.
            prepared: called once the module has the structure of a checkpoint, with the checkpoint and True if the
                module had adapters before.
            state_key: key of the callback's state in the checkpoint.
        """
        loaded = self.borrow(borrowed_checkpoint_hooks(module, check, self.adapter.replace, prepared))
        self.borrow(self.adapter.checkpoints(loaded, state_key))
        self.on_close(lambda: self.limits.take_back(trainer))

    def borrow(self, context: AbstractContextManager[Entered]) -> Entered:
        """Enter a context manager until `close`, and return its value."""
        return self._borrowed.enter_context(context)

    def on_close(self, call: Callable[[], object]) -> None:
        """Register a function to call on `close`."""
        self._borrowed.callback(call)

    def close(self) -> None:
        """Exit all contexts and call the registered functions, after those of later compressions of the same run."""
        for callback in reversed(self.turn.later):
            callback.fit.close()
        self._borrowed.close()

    def take_up_limits(self, trainer: L.Trainer, state: Mapping[str, Any]) -> None:
        """Raise the Trainer's limits to those at the time of saving. A second call changes nothing."""
        self.limits.take_back(trainer)
        self.limits = ExtendedLimits(**state["allowance"])
        self.limits.grant(trainer)

    def give_up_limits(self) -> None:
        """Restore the Trainer's original limits."""
        if self.trainer is not None:
            self.limits.take_back(self.trainer)
        self.limits = ExtendedLimits()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies and other processes, without the current run."""
        return self.__dict__ | {
            "turn": Turn(self.turn.number),
            "_trainer": None,
            "_adapter": None,
            "_borrowed": ExitStack(),
        }
