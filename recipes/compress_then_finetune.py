"""Compress, and train what is left, in one fit: `python recipes/compress_then_finetune.py CONFIG [key=value ...]`.

The dense model is trained for as many steps on the same text, so that the report tells recovery from adaptation.
"""

import copy
import sys
from dataclasses import asdict
from itertools import chain, cycle, islice

import lightning as L
import torch
from compress import CausalLM
from rich.console import Console

from zssvd_lightning import FactorRecovery, Phase, Run, RunConfig, ZSSVDCallback, load_config
from zssvd_lightning.errors import ConfigError
from zssvd_lightning.recovery import recovery_of
from zssvd_lightning.report import Stopwatch
from zssvd_lightning.targets import find_targets


class FineTuned(CausalLM):
    """Trains the layers that compression would have changed, as the recovery trains theirs."""

    def __init__(self, run: Run) -> None:
        super().__init__(copy.deepcopy(run.model))
        recovery, settings = recovery_of(run.config.recovery), run.config.compression
        self.optimizer = FactorRecovery(
            lr=run.config.training.dense_lr or recovery.lr, schedule=recovery.schedule, warmup=recovery.warmup
        ).optimizer
        self.requires_grad_(False)
        for target in find_targets(self.model, settings.include, settings.ignore).values():
            target.module.requires_grad_(True)

    def configure_optimizers(self) -> dict:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return self.optimizer(trained, self.trainer.max_steps)


class Measures(L.Callback):
    """Evaluates the truncated model, before any factor is trained."""

    def __init__(self, run: Run, compression: ZSSVDCallback) -> None:
        self.run = run
        self.compression = compression
        self.done = False

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: dict, idx: int) -> None:
        if self.compression.phase is Phase.RECOVER and not self.done:
            self.done = True
            self.run.evaluate("truncated")


def trainer(run: Run, steps: int, *callbacks: L.Callback) -> L.Trainer:
    training = run.config.training
    return L.Trainer(
        max_steps=steps,
        max_epochs=-1,
        precision=training.precision,
        gradient_clip_val=training.gradient_clip_val,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )


class Sequence(torch.utils.data.IterableDataset):
    """Batches for calibration and corrections, and then those to train on."""

    def __init__(self, *parts: list) -> None:
        self.parts = parts

    def __iter__(self) -> chain:
        return chain(*self.parts)


def main(path: str, *overrides: str) -> None:
    config = load_config(RunConfig, path, overrides)
    if recovery_of(config.recovery) is None:
        raise ConfigError(f"{path} has no recovery; set recovery.method, or run recipes/compress.py")
    run, watch, steps = Run(config), Stopwatch(), config.training.steps
    training = run.training_loader()
    run.evaluate("dense")

    with watch("finetune_dense"):
        dense = FineTuned(run)
        trainer(run, steps).fit(dense, training)
    run.evaluate("dense_finetuned", dense.model)
    del dense

    calibration = list(run.calibration_loader())
    callback = ZSSVDCallback(
        **asdict(config.compression), recovery=config.recovery, calibration_batches=len(calibration)
    )
    needed = callback.batches_needed()
    batches = Sequence(list(islice(cycle(calibration), needed)), list(training))
    module = CausalLM(run.model)
    fit = trainer(run, needed + steps, Measures(run, callback), callback)
    fit.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))

    run.evaluate("recovered")
    report = callback.report.within("model")
    report.seconds |= watch.seconds
    run.save(report, picture=True)
    Console().print(report.table())
    print(f"wrote the model, report.json and report.png to {run.output}")


if __name__ == "__main__":
    main(*sys.argv[1:])
