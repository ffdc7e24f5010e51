"""Compression and the training after it in one fit, for the command line and recipes."""

from collections.abc import Iterable, Iterator
from itertools import chain, cycle, islice
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel

from zssvd_lightning.app.run import Run
from zssvd_lightning.app.run_config import RunConfig
from zssvd_lightning.callbacks.schedule import Schedule
from zssvd_lightning.callbacks.zssvd import ZSSVDCallback
from zssvd_lightning.compression.phase import Phase
from zssvd_lightning.compression.report import Report
from zssvd_lightning.errors import ConfigError
from zssvd_lightning.recovery.methods import recovery_of
from zssvd_lightning.recovery.settings import Recovery

UNLIMITED = 10**6
"""Limit of the steps of a training that is limited in time."""


class LanguageModel(L.LightningModule):
    """Causal language model in training."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model.train()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        loss: Tensor = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return an optimizer that takes no step, since a recovery brings its own."""
        return torch.optim.AdamW(self.parameters(), lr=1e-5)


class EvaluateTruncated(L.Callback):
    """Callback that evaluates the truncated model once, before it is trained.

    It must stand before the compression among the callbacks, so that this is no part of the time of the training.
    """

    def __init__(self, run: Run, compression: ZSSVDCallback) -> None:
        self.run = run
        self.compression = compression
        self.done = False

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, idx: int) -> None:
        """Evaluate the truncated model before the first batch of its training."""
        if self.compression.phase is Phase.RECOVER and not self.done:
            self.done = True
            self.run.evaluate("truncated")


class EvaluateRecovered(L.Callback):
    """Callback that evaluates the trained model.

    It must stand behind the compression among the callbacks, so that the final state is evaluated.
    """

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate the final state, before it may be put in 8 bits."""
        self.run.evaluate("recovered")


class Batches(IterableDataset[Any]):
    """Batches of calibration and corrections, and then those to train on."""

    def __init__(self, *parts: Iterable[Any]) -> None:
        self.parts = parts

    def __iter__(self) -> Iterator[Any]:
        return chain(*self.parts)


def trainer(run: Run, steps: int, *callbacks: L.Callback) -> L.Trainer:
    """Return a Trainer of so many steps on the device of a run."""
    training, device = run.config.training, None if run.device is None else torch.device(run.device)
    return L.Trainer(
        accelerator="auto" if device is None else device.type,
        devices=1 if device is None or device.index is None else [device.index],
        max_steps=steps,
        max_epochs=-1,
        precision=training.precision,  # type: ignore[arg-type]
        gradient_clip_val=training.gradient_clip_val,
        callbacks=list(callbacks),
        enable_progress_bar=run.progress,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )


def merged_recovery(config: RunConfig) -> Recovery | None:
    """Return the recovery of a run. Raises ConfigError if it leaves an adapter beside the weights that are saved."""
    recovery = recovery_of(config.recovery)
    if recovery is not None and not recovery.merges:
        raise ConfigError(
            "recovery.merge is false, but the folder of a run is loaded without its adapter, so that what is measured "
            "as 'recovered' would not be what loads; leave recovery.merge out"
        )
    return recovery


def compress_and_train(run: Run) -> tuple[Report, int]:
    """Compress the model of a run and train it, as `recovery` says. Held-out text chooses the final state.

    It is evaluated as `truncated` before training, and as `recovered` after.

    Returns:
        The report, and the number of steps of the training.

    Raises:
        ZSSVDError: see `ZSSVDCallback`.
    """
    config = run.config
    recovery = merged_recovery(config)
    if recovery is None:
        raise ConfigError("there is no recovery; set recovery.method")
    callback = ZSSVDCallback.from_config(
        config.compression,
        schedule=Schedule(calibration_batches=config.calibration.batches),
        recovery=recovery,
        held_out=run.held_out_loader(),
        progress=run.progress,
    )
    needed = callback.batches_needed()
    steps = config.training.steps if recovery.minutes is None else UNLIMITED
    calibration = list(islice(cycle(run.calibration_loader()), needed))
    batches = Batches(calibration, run.training_loader(steps))
    fit = trainer(run, needed + steps, EvaluateTruncated(run, callback), callback, EvaluateRecovered(run))
    fit.fit(LanguageModel(run.model), DataLoader(batches, batch_size=None))
    if callback.report is None:
        raise RuntimeError("the fit ended without a report")
    return callback.report.within("model"), fit.global_step - needed
