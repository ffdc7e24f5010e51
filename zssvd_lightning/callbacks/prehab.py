"""Low-Rank Prehab (arXiv 2512.01980): training toward weights that lose less when they are truncated.

It minimizes `loss + lambda(t) mean_l R(W_l L_l)`, where R is a differentiable surrogate for the rank of a whitened
weight. `prehab/regularizers.py` defines R, and `prehab/run.py` holds the state of a run.

| hook                     | action                                                                             |
|--------------------------|------------------------------------------------------------------------------------|
| on_train_start           | refuse runs without whole weights or without enough steps before compression       |
| on_train_batch_start     | watch the inputs of the first batches, then start to increase lambda               |
| on_before_backward       | stop watching before activation checkpointing runs layers again                    |
| on_before_optimizer_step | add the gradient of the term, before clipping                                      |
| on_train_batch_end       | add the inputs of the batch to the second moments                                  |
| on_train_epoch_end       | stop watching a skipped batch                                                      |
| on_train_end             | release the layers                                                                 |
| teardown, on_exception   | remove the hooks from the layers, at any point of the run                          |
"""

import logging
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from zssvd_lightning._state_checks import anything, entries, finite_tensor, listed, mapped, optional, text, whole
from zssvd_lightning._types import of_type
from zssvd_lightning._validation import require, require_one_of
from zssvd_lightning.calibration.batches import token_mask
from zssvd_lightning.calibration.masks import mask_of
from zssvd_lightning.callbacks.callback_state import refuse_damaged
from zssvd_lightning.callbacks.schedule import ScheduledCompression
from zssvd_lightning.callbacks.trainer import telemetry
from zssvd_lightning.callbacks.trainer.guards import (
    most_accumulated,
    refuse_early_compression,
    refuse_other_package,
    steps_in,
)
from zssvd_lightning.callbacks.trainer.limits import batch_is_over, batches_run
from zssvd_lightning.callbacks.trainer.precision import loss_scale, scales
from zssvd_lightning.compression.phase import Phase
from zssvd_lightning.distributed import Shards
from zssvd_lightning.errors import CheckpointError, UnsupportedTrainingError
from zssvd_lightning.model.targets import find_targets
from zssvd_lightning.prehab.regularizers import REGULARIZERS, SCHEDULES
from zssvd_lightning.prehab.run import PrehabRun
from zssvd_lightning.strategies import RefusedAdapter, StrategyAdapter, adapter_for

logger = logging.getLogger(__name__)


VERSION = 1


STATE = entries(
    {
        "settings": mapped(anything),
        "begins_at": optional(whole),
        "gathering": optional(mapped(anything)),
        "leaders": mapped(text),
        "kept": mapped(finite_tensor),
        "vectors": mapped(finite_tensor),
        "left_out": listed(text),
    },
    ("left_out",),
)
"""Content of `LowRankPrehab.state_dict`, beside its version. Earlier releases left no layer out."""


class LowRankPrehab(L.Callback):
    """Callback that prepares a model for truncation by Low-Rank Prehab (arXiv 2512.01980) during ordinary training.

    The second moments of the layers' inputs come from the first training batches, which also train the model. After
    that, the callback adds lambda(t) mean_l R(W_l L_l) to the training loss. Lambda grows for `steps` optimizer steps
    and then stays constant, until the fit ends or a `ZSSVDCallback` in the same Trainer starts. The order of the two
    callbacks does not matter, but the `start_step` of `ZSSVDCallback` must leave enough steps. Layers that are frozen
    at the start of the fit are left out, and so are layers that the batches of the second moments have not reached. A
    fit that does not resume from a checkpoint starts from the beginning.

    Only the gradient of the term is added, once per optimizer step and before gradients are clipped. The training loss
    that the module logs does not include the term. A step has no term if float16 gradients overflow or if no batch
    returned a loss.

    The paper's code trains an update of `W L` and freezes everything else. Here the optimizer trains W and all its
    other parameters, so the learning rate acts in other coordinates and good values of `weight` differ. In the paper's
    code, lambda grows exponentially from 1e-4 to 10 over 10 steps for the stable rank (BERT), and is constantly 5 for
    the nuclear norm (ViT).

    Costs with the stable rank: A (n, n) in memory and in checkpoints, for every group of layers that share an input;
    per optimizer step the product `W A` of every layer, as much work as a forward pass over n tokens; and memory for a
    few float32 matrices of the size of the largest layer.

    Args:
        steps: number of optimizer steps over which lambda grows to `weight`, after those of `moment_batches`.
        weight: final value of lambda.
        schedule: growth of lambda, `linear` or `exponential` (from 1e-5 of `weight`).
        regularizer: R, either `stable_rank` (`||W L||_F^2 / ||W L||_2^2`) or `nuclear` (`||W L||_*`, which depends on
            the scale of W).
        moment_batches: number of training batches for the second moments. The accumulation window in which they end is
            completed.
        include: name patterns of the layers to regularize, as in `ZSSVDCallback`; None for all linear layers.
        ignore: name patterns of layers to leave out.

    Raises:
        ConfigError: an argument has another type or is out of range.
        UnsupportedTrainingError: at the start of `fit`, if optimization is manual, no process has whole weights, all
            layers are frozen, or a `ZSSVDCallback` would start too early.
        TargetError: at the start of `fit`, if there is no layer to regularize.
        CheckpointError: at the start of `fit`, if the checkpoint belongs to a prehab with other layers or settings.
        CalibrationError: during `fit`, if the first batches provide no second moments.
        NonFiniteError: during `fit`, if the term is NaN or infinite.

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
        steps, weight = of_type(int, steps, "steps"), of_type(float, weight, "weight")
        moment_batches = of_type(int, moment_batches, "moment_batches")
        require(steps >= 1, "steps", steps, "1 or more")
        require(weight > 0, "weight", weight, "more than 0 and finite")
        require_one_of("schedule", schedule, SCHEDULES)
        require_one_of("regularizer", regularizer, REGULARIZERS)
        require(moment_batches >= 1, "moment_batches", moment_batches, "1 or more")
        self.steps = steps
        self.weight = weight
        self.schedule = schedule
        self.regularizer = regularizer
        self.moment_batches = moment_batches
        self.include: list[str] | None = of_type(list[str] | None, include, "include")
        self.ignore: list[str] | None = of_type(list[str] | None, ignore, "ignore")
        self._watching = ExitStack()
        self._fitting = True
        self._trainer: weakref.ref[L.Trainer] | None = None
        self._run = PrehabRun()
        self._run_before = 0

    def token_mask(self, batch: Any) -> Tensor | None:
        """Return the mask (B, T) of the positions of a batch that are not padding.

        None goes by the masks that the model is called with. Override this method for batches without an
        `attention_mask` whose model is not called with one either.
        """
        return token_mask(batch)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Reset the state at the start of a fit."""
        refuse_other_package(trainer)
        self._fitting = stage == "fit"
        if self._fitting:
            self._trainer, self._run, self._run_before = weakref.ref(trainer), PrehabRun(), 0

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Remove all hooks from the layers."""
        self._watching.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Remove all hooks from the layers."""
        self._watching.close()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse unsupported runs before the first batch, then start or continue from a checkpoint.

        Raises:
            UnsupportedTrainingError: all layers to regularize are frozen, or the run is not supported.
        """
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
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            if trainer.is_global_zero:
                logger.warning("fast_dev_run: LowRankPrehab has been set up but adds nothing, for lack of batches")
            return
        if (compression := _compression(trainer)) is not None:
            refuse_early_compression(trainer, compression.schedule, self._begins_at(trainer), self.steps)
        self._run.attach(pl_module, trained, adapter.team)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Watch the inputs of the batch, or start to regularize after enough batches."""
        self._watching.close()
        run = self._run
        self._run_before, run.vectors_before = batches_run(trainer), dict(run.vectors)
        if self._ended(trainer) or run.gathering is None:
            return
        opens_window = batch_idx % trainer.accumulate_grad_batches == 0
        if run.batches >= self.moment_batches and opens_window:
            run.begin(REGULARIZERS[self.regularizer], trainer.global_step)
        else:
            self._watching.enter_context(run.watching(mask_of(batch, self.token_mask)))

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Stop watching before activation checkpointing runs layers again."""
        self._watching.close()

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Add the gradient of the term, and log it at the steps at which Lightning logs."""
        run = self._run
        if self._ended(trainer) or not run.kept or not _has_gradients(optimizer):
            return
        if scales(trainer) and not run.gradients_are_finite:
            return
        weight = self.weight * SCHEDULES[self.schedule](self._done(trainer.global_step + 1))
        divides = getattr(optimizer, "_step_supports_amp_scaling", False)  # fused optimizers divide by the loss scale
        regularizer = REGULARIZERS[self.regularizer]
        value = run.add_gradients(regularizer, weight * (loss_scale(trainer) if divides else 1.0))
        if telemetry.is_due(trainer, trainer.global_step + 1):
            telemetry.log(trainer, telemetry.PREFIX, **{"prehab_weight": weight, regularizer.metric: value})

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Add the inputs of the batch to the second moments."""
        self._watching.close()
        self._run.absorb()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop watching a batch that was skipped."""
        self._watching.close()
        self._run.window = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Release the layers, and warn if the fit was too short."""
        if self._run.targets and self._done(trainer.global_step) < 1:
            self._warn("the fit has ended", trainer)
        self._run.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return plain types and tensors in the state between two batches; valid at any moment. Collective."""
        trainer = None if self._trainer is None else self._trainer()
        over = trainer is None or batch_is_over(trainer)
        if over and trainer is not None and batches_run(trainer) > self._run_before:
            self._run.absorb()
        return {"version": VERSION, "settings": self._settings(), **self._run.state_dict(over)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of a checkpoint in a fit. Raises CheckpointError if it does not match."""
        if not self._fitting:
            return
        if state_dict.get("version") != VERSION:
            raise CheckpointError(
                f"the checkpoint holds state of LowRankPrehab of version {state_dict.get('version')}, this release "
                f"reads {VERSION}; go on with the release that wrote it"
            )
        refuse_damaged(STATE, state_dict)
        mine, saved = self._settings(), state_dict["settings"]
        differing = [name for name in mine if saved.get(name) != mine[name]]
        other = [f"{name} was {saved.get(name)!r} and is {mine[name]!r}" for name in differing]
        if other:
            raise CheckpointError(
                f"the checkpoint is of a LowRankPrehab with other settings ({'; '.join(other)}); go on with the same, "
                "or leave the callback out"
            )
        self._run.load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies and other processes, without the current run."""
        return self.__dict__ | {"_trainer": None, "_run": PrehabRun(), "_watching": ExitStack()}

    def _settings(self) -> dict[str, Any]:
        names = ("steps", "weight", "schedule", "regularizer", "moment_batches")
        patterns = {"include": self.include, "ignore": self.ignore}
        return {name: getattr(self, name) for name in names} | {
            name: None if given is None else list(given) for name, given in patterns.items()
        }

    def _ended(self, trainer: L.Trainer) -> bool:
        """Return True if a compression has started, and release the layers in that case."""
        compression = _compression(trainer)
        if compression is None or compression.phase is Phase.WAIT:
            return False
        if self._run.targets and self._done(trainer.global_step) < 1:
            self._warn("compression has begun", trainer)
        self._run.release()
        return True

    def _begins_at(self, trainer: L.Trainer) -> float:
        """Return the global step of the first gradient, as expected at the start of training."""
        if self._run.begins_at is not None:
            return self._run.begins_at
        missing = max(self.moment_batches - self._run.batches, 0)
        return trainer.global_step + steps_in(missing, trainer.num_training_batches, most_accumulated(trainer))

    def _done(self, step: int) -> float:
        """Return the fraction of `steps` that is done at a global step."""
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


def _compression(trainer: L.Trainer) -> ScheduledCompression | None:
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, ScheduledCompression)), None)
