"""Low-Rank Prehab (arXiv 2512.01980): training towards weights that lose less when they are truncated.

What is minimized is `loss + lambda(t) mean_l R(W_l L_l)`, where R is a differentiable stand-in for the rank of a
whitened weight; R is in `regularizers.py`, what is kept of a run in `preparing.py`.

| hook                     | what is done there                                                                 |
|--------------------------|------------------------------------------------------------------------------------|
| on_train_start           | is the run of a kind that has whole weights, and is there time before compression? |
| on_train_batch_start     | the inputs of the first batches are watched; when enough were seen, lambda grows   |
| on_before_backward       | watching ends, before activation checkpointing runs layers again                   |
| on_before_optimizer_step | the gradient of the term is added, before clipping                                 |
| on_train_batch_end       | the inputs of the batch are added to the second moments                            |
| on_train_epoch_end       | watching of a skipped batch ends                                                   |
| on_train_end             | the layers are let go                                                              |
| teardown, on_exception   | hooks on the layers are taken off, wherever the run has come to                    |
"""

import logging
import math
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from zssvd_lightning._validation import require
from zssvd_lightning.calibration.batches import token_mask
from zssvd_lightning.callbacks.trainer import telemetry
from zssvd_lightning.callbacks.trainer.guards import most_accumulated, refuse_early_compression, steps_in
from zssvd_lightning.callbacks.trainer.limits import batch_is_over, batches_run
from zssvd_lightning.callbacks.trainer.precision import loss_scale, scales
from zssvd_lightning.callbacks.zssvd import ZSSVDCallback
from zssvd_lightning.compression.phase import Phase
from zssvd_lightning.distributed import Shards
from zssvd_lightning.errors import CheckpointError, UnsupportedTrainingError
from zssvd_lightning.model.targets import find_targets
from zssvd_lightning.prehab.regularizers import REGULARIZERS, SCHEDULES
from zssvd_lightning.prehab.run import PrehabRun
from zssvd_lightning.strategies import RefusedAdapter, StrategyAdapter, adapter_for

logger = logging.getLogger(__name__)


VERSION = 1


class LowRankPrehab(L.Callback):
    """Prepares a model for truncation by Low-Rank Prehab (arXiv 2512.01980), in ordinary training before it.

    The second moments of the layers' inputs are taken from the first training batches, which train the model as ever.
    From then on it adds lambda(t) mean_l R(W_l L_l) to the training loss: lambda grows for `steps` optimizer steps and
    then stays, until a `ZSSVDCallback` in the same Trainer begins, wherever that is in the list of callbacks, or the
    fit ends. The `start_step` of `ZSSVDCallback` must leave room for it. Layers that are frozen when the fit starts
    are left out. A fit that goes on from no checkpoint starts afresh.

    The term comes as its gradient, to that of the loss, once per optimizer step and before gradients are clipped: the
    training loss that the module logs is without it. A step for which float16 gradients overflow, or for which no
    batch gave a loss, has no term.

    The paper's code trains a change to `W L`, with all else frozen; here the optimizer has W itself and whatever else
    it was given, so that the learning rate acts in other coordinates and a good `weight` is another. There lambda grows
    exponentially from 1e-4 to 10 over 10 steps for the stable rank (BERT), and is always 5 for the nuclear norm (ViT).

    What it takes with the stable rank, beside A (n, n) for every group of layers that share an input, in memory and in
    checkpoints: for every optimizer step the product `W A` of every layer, which is the work of a forward pass over n
    tokens, and memory for a few matrices of the size of the largest layer in float32.

    Args:
        steps: optimizer steps over which lambda grows to `weight`, after those of `moment_batches`.
        weight: lambda in the end.
        schedule: how lambda grows, `linear` or `exponential` (from 1e-5 of `weight`).
        regularizer: R, `stable_rank` (`||W L||_F^2 / ||W L||_2^2`) or `nuclear` (`||W L||_*`, not free of scale).
        moment_batches: training batches the second moments are taken from, with the accumulation window they end in.
        include: name patterns of the layers to regularize, as `ZSSVDCallback` takes them; all linear ones when None.
        ignore: name patterns of layers to leave alone.

    Raises:
        ConfigError: an argument is out of range.
        UnsupportedTrainingError: at the start of `fit`, when optimization is manual, the strategy keeps no whole
            weights on a process, all layers are frozen, or a `ZSSVDCallback` would begin too early.
        TargetError: at the start of `fit`, when there is no layer to regularize.
        CheckpointError: at the start of `fit`, when the checkpoint is of a prehab of other layers or settings.
        CalibrationError: during `fit`, when the first batches do not give the second moments.
        NonFiniteError: during `fit`, when the term is NaN or infinite.

    Example:
        >>> prehab = LowRankPrehab(steps=200)
        >>> callbacks = [prehab, ZSSVDCallback(0.4, schedule=Schedule(start_step=216))]  # doctest: +SKIP
    """

    def __init__(
        self,
        steps: int = 200,
        *,
        weight: float = 1.0,
        schedule: str = "linear",
        regularizer: str = "stable_rank",
        moment_batches: int = 16,
        include: Sequence[str] | str | None = None,
        ignore: Sequence[str] | str | None = None,
    ) -> None:
        super().__init__()
        require(steps >= 1, "steps", steps, "1 or more")
        require(0 < weight < math.inf, "weight", weight, "more than 0 and finite")
        require(schedule in SCHEDULES, "schedule", schedule, f"one of {', '.join(SCHEDULES)}")
        require(regularizer in REGULARIZERS, "regularizer", regularizer, f"one of {', '.join(REGULARIZERS)}")
        require(moment_batches >= 1, "moment_batches", moment_batches, "1 or more")
        self.steps = steps
        self.weight = weight
        self.schedule = schedule
        self.regularizer = regularizer
        self.moment_batches = moment_batches
        self.include = [include] if isinstance(include, str) else include
        self.ignore = [ignore] if isinstance(ignore, str) else ignore
        self._watching = ExitStack()
        self._fitting = True
        self._trainer: weakref.ref[L.Trainer] | None = None
        self._run = PrehabRun()
        self._run_before = 0

    def token_mask(self, batch: Any) -> Tensor | None:
        """Which positions (B, T) of a batch are not padding. Override for batches without an `attention_mask`."""
        return token_mask(batch)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Starts afresh, in a fit."""
        self._fitting = stage == "fit"
        if self._fitting:
            self._trainer, self._run, self._run_before = weakref.ref(trainer), PrehabRun(), 0

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leaves no hook on the layers."""
        self._watching.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leaves no hook on the layers."""
        self._watching.close()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuses runs that the term cannot be added in, before any batch is spent; goes on from a checkpoint."""
        if self._ended(trainer):
            return
        adapter = adapter_for(trainer, pl_module)
        _refuse_unsupported(pl_module, adapter)
        targets = find_targets(pl_module, self.include, self.ignore)
        trained = {name: target for name, target in targets.items() if target.module.weight.requires_grad}
        if not trained:
            raise UnsupportedTrainingError(
                f"all {len(targets)} layers to regularize are frozen, so that the term would change nothing; unfreeze "
                "some, or include others"
            )
        if (compression := _compression(trainer)) is not None:
            start = compression.schedule.start_epoch, compression.schedule.start_step
            refuse_early_compression(trainer, *start, self._begins_at(trainer), self.steps)
        self._run.attach(pl_module, trained, adapter.team)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Watches the inputs of the batch, or begins to regularize when enough were seen."""
        self._watching.close()
        run = self._run
        self._run_before, run.vectors_before = batches_run(trainer), dict(run.vectors)
        if self._ended(trainer) or run.gathering is None:
            return
        opens_window = batch_idx % trainer.accumulate_grad_batches == 0
        if run.batches >= self.moment_batches and opens_window:
            run.begin(REGULARIZERS[self.regularizer], trainer.global_step)
        else:
            self._watching.enter_context(run.watching(self.token_mask(batch)))

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Stops watching, before activation checkpointing runs layers again."""
        self._watching.close()

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Adds the gradient of the term, and tells loggers of it at the steps Lightning logs at."""
        run = self._run
        if self._ended(trainer) or not run.kept or not _has_gradients(optimizer):
            return
        if scales(trainer) and not run.gradients_are_finite:
            return
        weight = self.weight * SCHEDULES[self.schedule](self._done(trainer.global_step + 1))
        divides = getattr(optimizer, "_step_supports_amp_scaling", False)  # the loss scale out of gradients, as fused
        regularizer = REGULARIZERS[self.regularizer]
        value = run.add_gradients(regularizer, weight * (loss_scale(trainer) if divides else 1.0))
        if (trainer.global_step + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            telemetry.log(trainer, **{"prehab_weight": weight, regularizer.metric: value})

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Adds the inputs of the batch to the second moments."""
        self._watching.close()
        self._run.absorb()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops watching a batch that was skipped."""
        self._watching.close()
        self._run.window = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lets the layers go, and warns when the fit was too short."""
        if self._run.targets and self._done(trainer.global_step) < 1:
            self._warn("the fit has ended", trainer)
        self._run.detach()

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors, as they are between two batches at whatever moment it is called. Collective."""
        trainer = None if self._trainer is None else self._trainer()
        over = trainer is None or batch_is_over(trainer)
        if over and trainer is not None and batches_run(trainer) > self._run_before:
            self._run.absorb()
        return {"version": VERSION, "settings": self._settings(), **self._run.state_dict(over)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the state of a checkpoint, for a fit. Raises CheckpointError when it cannot."""
        if not self._fitting:
            return
        if state_dict.get("version") != VERSION:
            raise CheckpointError(
                f"the checkpoint holds state of LowRankPrehab of version {state_dict.get('version')}, this release "
                f"reads {VERSION}; go on with the release that wrote it"
            )
        mine, saved = self._settings(), state_dict["settings"]
        other = [f"{name} was {saved[name]!r} and is {mine[name]!r}" for name in mine if saved[name] != mine[name]]
        if other:
            raise CheckpointError(
                f"the checkpoint is of a LowRankPrehab with other settings ({'; '.join(other)}); go on with the same, "
                "or leave the callback out"
            )
        self._run.load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """What goes along with a copy, or to another process: nothing of the run under way."""
        return self.__dict__ | {"_trainer": None, "_run": PrehabRun(), "_watching": ExitStack()}

    def _settings(self) -> dict[str, Any]:
        names = ("steps", "weight", "schedule", "regularizer", "moment_batches")
        patterns = {"include": self.include, "ignore": self.ignore}
        return {name: getattr(self, name) for name in names} | {
            name: None if given is None else list(given) for name, given in patterns.items()
        }

    def _ended(self, trainer: L.Trainer) -> bool:
        """Whether a compression has begun, for which the layers are let go."""
        compression = _compression(trainer)
        if compression is None or compression.phase is Phase.WAIT:
            return False
        if self._run.targets and self._done(trainer.global_step) < 1:
            self._warn("compression has begun", trainer)
        self._run.release()
        return True

    def _begins_at(self, trainer: L.Trainer) -> float:
        """The global step of the first gradient, as far as is known at the start of training."""
        if self._run.begins_at is not None:
            return self._run.begins_at
        missing = max(self.moment_batches - self._run.batches, 0)
        return trainer.global_step + steps_in(missing, trainer.num_training_batches, most_accumulated(trainer))

    def _done(self, step: int) -> float:
        """Which fraction of the steps is done at a global step."""
        return 0.0 if self._run.begins_at is None else min((step - self._run.begins_at) / self.steps, 1.0)

    def _warn(self, event: str, trainer: L.Trainer) -> None:
        logger.warning(
            "%s at step %d, before the weight of LowRankPrehab has grown to %s, which takes steps=%d after the %d "
            "batches of the second moments; train longer before, or lower steps or moment_batches",
            event,
            trainer.global_step,
            self.weight,
            self.steps,
            self.moment_batches,
        )


def _refuse_unsupported(pl_module: L.LightningModule, adapter: StrategyAdapter) -> None:
    if not pl_module.automatic_optimization:
        raise UnsupportedTrainingError(
            f"{type(pl_module).__name__} optimizes manually, so that it is not known which batches a step is of; set "
            "automatic_optimization = True"
        )
    if isinstance(adapter, RefusedAdapter) or isinstance(adapter.team, Shards):
        raise UnsupportedTrainingError(
            f"under {type(adapter.trainer.strategy).__name__} no process has whole weights, which prehab needs; run it "
            "in a first fit on one device or with strategy='ddp', and compress in a second one"
        )


def _has_gradients(optimizer: torch.optim.Optimizer) -> bool:
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


def _compression(trainer: L.Trainer) -> ZSSVDCallback | None:
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, ZSSVDCallback)), None)
