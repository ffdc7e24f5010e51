"""The part of the callback that outlives a process and a Trainer: its state in checkpoints, and what it borrows.

Checkpoints may be saved at any moment; see `Lifecycle.state_dict` for what is in those from the middle of something.
"""

import functools
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import lightning as L

from zssvd_lightning.callbacks.checkpoint_hooks import borrowed_checkpoint_hooks
from zssvd_lightning.callbacks.lifecycle import Lifecycle
from zssvd_lightning.callbacks.limits import ExtendedLimits, batch_is_over
from zssvd_lightning.compression.phase import Phase
from zssvd_lightning.compression.report import Report
from zssvd_lightning.errors import CheckpointError
from zssvd_lightning.serialization.specs import ranks_of
from zssvd_lightning.serialization.state_dict import note
from zssvd_lightning.strategies import StrategyAdapter, adapter_for


class ResumableCallback(L.Callback):
    """Goes on from checkpoints, and gives back to the Trainer and the module what it borrows of them for a run.

    Args:
        begin: makes the lifecycle of a compression that has not begun.
        extend_training: whether the Trainer's limits are raised by what a compression takes of them.
    """

    def __init__(self, begin: Callable[[], Lifecycle], extend_training: bool) -> None:
        super().__init__()
        self.extend_training = extend_training
        self.recovers_from: int | None = None
        self._begin = begin
        self._lifecycle = begin()
        self._limits = ExtendedLimits()
        self._borrowed = ExitStack()
        self._trainer: weakref.ref[L.Trainer] | None = None
        self._adapter: StrategyAdapter | None = None
        self._fitting, self._resumed = True, False
        self._compressed: weakref.ref[L.LightningModule] | None = None

    @property
    def adapter(self) -> StrategyAdapter:
        """The strategy of the run."""
        if self._adapter is None:
            raise RuntimeError("the strategy of the run is known from setup on")
        return self._adapter

    @property
    def phase(self) -> Phase:
        """Where the compression stands."""
        return self._lifecycle.phase

    @property
    def report(self) -> Report | None:
        """What was done, from FACTORIZE on."""
        return self._lifecycle.report

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Has the module's structure follow its checkpoints, and forgets the compression of another module."""
        self._borrowed.close()
        self._trainer, self._fitting, self._resumed = weakref.ref(trainer), stage == "fit", False
        self._adapter = adapter_for(trainer, pl_module)
        if self._fitting and self.phase in (Phase.RECOVER, Phase.DONE):
            if not self._has_compressed(pl_module):
                self._start_over()
            else:
                self.recovers_from = 0
        prepared = functools.partial(self._prepared, pl_module)
        hooks = borrowed_checkpoint_hooks(pl_module, self._check, self._adapter.replace, prepared)
        loaded = self._borrowed.enter_context(hooks)
        self._borrowed.enter_context(self._adapter.checkpoints(loaded, self.state_key))
        self._borrowed.callback(lambda: self._limits.take_back(trainer))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Gives back what was borrowed."""
        self._borrowed.close()

    def state_dict(self) -> dict[str, Any]:
        """The lifecycle and what it has taken of the training, as plain types and tensors."""
        over, batch = self._batch_is_over(), self._lifecycle.batch
        uncounted = self.extend_training and over and batch is not None
        team = None if self._adapter is None else self._adapter.team
        return self._lifecycle.state_dict(over, team) | {
            "allowance": self._limits.state_dict(uncounted, batch is not None and batch.stepped),
            "recovers_from": self.recovers_from,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the state of a checkpoint, for a fit. Raises CheckpointError when it cannot."""
        if self._fitting:
            self._lifecycle.load_state_dict(state_dict)
            self.recovers_from = state_dict["recovers_from"]
            self._resumed = True

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Raises the Trainer's limits as they were when the checkpoint was taken, before it compares with them."""
        if self._fitting and (state := checkpoint["callbacks"].get(self.state_key)) is not None:
            self._take_up_allowance(trainer, state)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the note for loads that know nothing of low-rank layers, also after a run."""
        checkpoint["state_dict"].update(note(pl_module))

    def refuse_state(self, state: Mapping[str, Any]) -> None:
        """Raises CheckpointError for a callback state that a fit cannot go on from; nothing has been loaded then."""
        self._lifecycle.check(state)

    def __getstate__(self) -> dict[str, Any]:
        """What goes along with a copy, or to another process: nothing of the run under way."""
        return self.__dict__ | {"_trainer": None, "_adapter": None, "_compressed": None, "_borrowed": ExitStack()}

    def _take_up_allowance(self, trainer: L.Trainer, state: Mapping[str, Any]) -> None:
        """Raises the Trainer's limits as they were when the state was taken; once more makes no difference."""
        self._limits.take_back(trainer)
        self._limits = ExtendedLimits(**state["allowance"])
        self._limits.grant(trainer)

    def _prepared(self, pl_module: L.LightningModule, checkpoint: Mapping[str, Any], had_adapters: bool) -> None:
        """Is called when the module has the structure of a checkpoint that is about to be loaded."""

    def _check(self, checkpoint: Mapping[str, Any]) -> None:
        if self._fitting and any(n.endswith(("_codes", ".codes")) for n in checkpoint.get("state_dict", {})):
            raise CheckpointError(
                "the checkpoint was saved after its fit, with layers in 8 bits, which are not trained; go on from a "
                "checkpoint of the fit itself"
            )
        if self._fitting and (state := checkpoint.get("callbacks", {}).get(self.state_key)) is not None:
            self.refuse_state(state)

    def _has_compressed(self, pl_module: L.LightningModule) -> bool:
        """Whether this module is the one behind the report, and still as low-rank as that says."""
        if self._resumed:
            return True
        if self.report is None or self._compressed is None or self._compressed() is not pl_module:
            return False
        ranks = {name: layer.rank for name, layer in self.report.layers.items() if layer.rank is not None}
        return ranks.items() <= ranks_of(pl_module).items()

    def _start_over(self) -> None:
        self._lifecycle, self._limits, self.recovers_from = self._begin(), ExtendedLimits(), None

    def _abandon(self, pl_module: L.LightningModule) -> None:
        """Puts the module and the Trainer's limits back, and starts over."""
        if self._adapter is not None:  # else the run went on in other processes than this one
            touched = self._lifecycle.has_touched
            if touched:
                self._adapter.unwrap_parameters()
            self._lifecycle.abandon(pl_module, self._adapter)
            if touched:
                self._adapter.sync_requires_grad()
                self._adapter.discard_replaced()
        if self._trainer is not None and (trainer := self._trainer()) is not None:
            self._limits.take_back(trainer)
        self._limits, self.recovers_from = ExtendedLimits(), None

    def _batch_is_over(self) -> bool:
        """Whether Lightning would not run the latest batch again."""
        trainer = self._trainer() if self._trainer is not None else None
        return trainer is None or batch_is_over(trainer)
