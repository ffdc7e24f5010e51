"""Held-out batches and the clock of a recovery: the best state is kept, and the steps fit into a time."""

import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from zssvd_lightning.callbacks.batch_meaning import BatchMeaning
from zssvd_lightning.callbacks.fit_context import FitContext
from zssvd_lightning.callbacks.trainer import telemetry
from zssvd_lightning.callbacks.trainer.limits import stopping_now
from zssvd_lightning.callbacks.trainer.replay import Replay
from zssvd_lightning.errors import ConfigError, UnsupportedTrainingError
from zssvd_lightning.recovery.judge import Judge
from zssvd_lightning.recovery.pace import Pace
from zssvd_lightning.recovery.run import RecoveryRun
from zssvd_lightning.recovery.settings import Recovery

logger = logging.getLogger(__name__)


class Judging:
    """Part of the hooks of a recovery that decides how long it trains and which of its states is the final one.

    Args:
        fit: context of the run.
        meaning: the callback, which interprets batches.
        held_out: batches that compare the states; None to keep the last state.
    """

    def __init__(self, fit: FitContext, meaning: BatchMeaning, held_out: Sequence[Any] | None) -> None:
        self._fit, self._meaning, self._held_out = fit, meaning, held_out

    @property
    def is_asked(self) -> bool:
        """True if there are held-out batches."""
        return self._held_out is not None

    def check(self, trainer: L.Trainer, module: L.LightningModule, recovery: RecoveryRun) -> None:
        """Measure one held-out batch, so that batches that cannot be run fail before calibration."""
        if (judge := self._judge(trainer, module, recovery)) is not None:
            judge.check()

    def start(self, trainer: L.Trainer, module: L.LightningModule, recovery: RecoveryRun) -> None:
        """Judge the present state, and prepare the clock of a recovery that is limited in time."""
        minutes = recovery.settings.minutes
        if minutes is not None and recovery.steps is None:
            recovery.pace = Pace(minutes)
        elif recovery.steps is not None:
            _limit_steps(trainer, recovery.first_step + recovery.steps, self._fit)
        began = time.perf_counter()
        recovery.start_judging(self._judge(trainer, module, recovery), module)
        if recovery.pace is not None and recovery.judge is not None:
            recovery.pace.measured(time.perf_counter() - began)

    def end_batch(self, trainer: L.Trainer, module: L.LightningModule, recovery: RecoveryRun) -> None:
        """Measure the state when it is due, stop training that no longer improves it, and set the number of steps."""
        steps = trainer.global_step - recovery.first_step
        if recovery.pace is not None:
            _set_steps(trainer, recovery, recovery.pace, self._fit)
        if recovery.judge is None or not recovery.judge.is_due(steps):
            return
        self._fit.adapter.unwrap_parameters()
        goes_on = recovery.judge.consider(module, steps)
        telemetry.log(trainer, self._fit.turn.prefix, held_out_loss=recovery.judge.latest)
        if not goes_on:
            logger.info("training stops, because the loss on the held-out batches has not improved for a while")
            self.stop(trainer)

    def stop(self, trainer: L.Trainer) -> None:
        """End the fit after this batch."""
        self._fit.borrow(stopping_now(trainer))

    def settled(
        self, trainer: L.Trainer, module: L.LightningModule, judge: Judge, recovery: RecoveryRun
    ) -> dict[str, float]:
        """Return to the best state, say which it is, and return the losses for the report."""
        judge.settle(module, trainer.global_step - recovery.first_step)
        found = judge.report()
        if found["step"] == 0:
            logger.warning(
                "training did not lower the loss on the held-out batches (%.4f), so that the compressed model is as it "
                "was before training; lower recovery.lr, or train longer",
                found["truncated"],
            )
        else:
            logger.info(
                "training lowered the loss on the held-out batches from %.4f to %.4f, in %d of %d steps",
                *(found[key] for key in ("truncated", "recovered", "step", "steps")),
            )
        return found

    def _judge(self, trainer: L.Trainer, module: L.LightningModule, recovery: RecoveryRun) -> Judge | None:
        if self._held_out is None:
            return None
        adapter, settings = self._fit.adapter, recovery.settings
        if not adapter.team.whole_everywhere:
            raise UnsupportedTrainingError(
                "held-out batches judge only models of which every process holds all weights; leave held_out out, or "
                "train on one device or by DDP"
            )
        replay = Replay(trainer, module, adapter, self._meaning)

        def measure(batch: Any) -> tuple[float, float]:
            found = replay(batch)
            return adapter.team.decide_on_first(lambda: found)  # processes may round differently

        return Judge(measure, self._held_out, settings.judge_every, settings.patience)


def judged_by(held_out: Iterable[Any] | None, recovery: Recovery | None) -> list[Any] | None:
    """Return the held-out batches as a list; None if there are none to use.

    Raises:
        ConfigError: there is no recovery to judge, no batch, or a single batch instead of a list.
    """
    if held_out is None:
        return None
    if isinstance(held_out, Mapping | str | Tensor):
        raise ConfigError(f"held_out is a {type(held_out).__name__}, not a list of batches; give [batch]")
    batches = list(held_out)
    if recovery is None:
        raise ConfigError("held_out judges the training of a recovery, and there is none; set recovery")
    if not batches:
        raise ConfigError("held_out has no batches; give some, or leave it out")
    return batches


def _set_steps(trainer: L.Trainer, recovery: RecoveryRun, pace: Pace, fit: FitContext) -> None:
    """Set the number of steps once enough were timed, and end the learning-rate schedule with them. Collective.

    Args:
        trainer: the Trainer.
        recovery: the recovery.
        pace: its clock.
        fit: context of the run, which takes the limit of the Trainer back.
    """
    done = trainer.global_step - recovery.first_step
    every = None if recovery.judge is None else recovery.settings.judge_every
    found = fit.adapter.team.decide_on_first(lambda: pace.steps(done, every))
    if found is None:
        return
    limits = [trainer.max_steps - recovery.first_step] if trainer.max_steps != -1 else []
    if recovery.horizon is not None and math.isfinite(recovery.horizon[0]):
        limits.append(max(done, int(recovery.horizon[0])))  # max_epochs, too, may end the training before its time
    recovery.steps = min([found, *limits])
    recovery.pace = None
    logger.info("training takes %d steps, which fit into %g minutes", recovery.steps, recovery.settings.minutes)
    _limit_steps(trainer, recovery.first_step + recovery.steps, fit)
    if recovery.settings.lr is not None:
        _end_schedule(trainer, recovery, recovery.settings.lr)


def _limit_steps(trainer: L.Trainer, steps: int, fit: FitContext) -> None:
    """Limit the Trainer to so many optimizer steps, until the end of the fit."""
    loop = trainer.fit_loop.epoch_loop
    before = loop.max_steps
    loop.max_steps = steps

    def take_back() -> None:
        loop.max_steps += before - steps  # other changes of the limit stay

    fit.on_close(take_back)


def _end_schedule(trainer: L.Trainer, recovery: RecoveryRun, lr: float) -> None:
    """Give the schedule of the optimizer the length of the recovery."""
    for config in trainer.lr_scheduler_configs:
        scheduler = config.scheduler
        if not isinstance(scheduler, LambdaLR):
            logger.warning("%s cannot be made to end with the time of the recovery", type(scheduler).__name__)
            continue
        groups = [{"params": [torch.zeros(1)], "lr": rate} for rate in scheduler.base_lrs]
        like = recovery.settings.scheduler(torch.optim.AdamW(groups, lr=lr), recovery.steps_of_stage)
        scheduler.lr_lambdas = like.lr_lambdas
