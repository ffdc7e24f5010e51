"""Compress, and train what is left, in one fit: `python -m recipes.compress_then_finetune CONFIG [key=value ...]`.

The dense model is then trained for as many steps on the same text, so that the report tells recovery from adaptation.
"""

import copy
from dataclasses import replace
from itertools import chain, cycle, islice

import lightning as L
import torch
from rich.console import Console
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from recipes.compress import CausalLM
from zssvd_lightning import Phase, Run, RunConfig, Schedule, ZSSVDCallback, load_config
from zssvd_lightning._resources import Stopwatch
from zssvd_lightning.app.command import start
from zssvd_lightning.errors import ConfigError
from zssvd_lightning.model.targets import find_targets, matches
from zssvd_lightning.recovery.methods import recovery_of
from zssvd_lightning.recovery.settings import Recovery


class FineTuned(CausalLM):
    """Trains, of a dense model, the layers that are low-rank in the other, and what is trained beside them there."""

    def __init__(self, model: PreTrainedModel, recovery: Recovery, run: Run) -> None:
        super().__init__(model)
        self.recovery = replace(recovery, lr=run.config.training.dense_lr or recovery.lr)
        settings = run.config.compression
        targets = find_targets(model, settings.include, settings.ignore)
        names = {f"{name}.{part}" for name in targets if recovery.chooses(name) for part in ("weight", "bias")}
        for name, parameter in model.named_parameters():
            beside = any(matches(name, pattern) for pattern in recovery.also_train)
            parameter.requires_grad_(name in names or beside)

    def configure_optimizers(self) -> dict:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return self.recovery.optimizer(trained, self.trainer.max_steps)


class Measures(L.Callback):
    """Callback that evaluates the truncated model before its factors are trained, and the model after training."""

    def __init__(self, run: Run, compression: ZSSVDCallback) -> None:
        self.run = run
        self.compression = compression
        self.done = False

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: dict, idx: int) -> None:
        if self.compression.phase is Phase.RECOVER and not self.done:
            self.done = True
            self.run.evaluate("truncated")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.run.evaluate("recovered")


class Batches(torch.utils.data.IterableDataset):
    """Batches of calibration and corrections, and then those to train on."""

    def __init__(self, *parts: list) -> None:
        self.parts = parts

    def __iter__(self) -> chain:
        return chain(*self.parts)


def trainer(run: Run, steps: int, *callbacks: L.Callback) -> L.Trainer:
    training = run.config.training
    return L.Trainer(
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        precision=training.precision,
        gradient_clip_val=training.gradient_clip_val,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )


def checked(path: str, *overrides: str) -> tuple[RunConfig, Recovery]:
    config = load_config(RunConfig, path, overrides)
    recovery = recovery_of(config.recovery)
    if recovery is None:
        raise ConfigError(f"{path} has no recovery; set recovery.method, or run recipes/compress.py")
    if recovery.lr is None:
        raise ConfigError("recovery.lr is null, but there is no other optimizer in this recipe; set it")
    if config.evaluation.text is None:
        raise ConfigError("evaluation.text is null, so nothing would be measured; name a text")
    return config, recovery


def main(path: str, *overrides: str) -> None:
    config, recovery = checked(path, *overrides)
    run, watch, steps = Run(config), Stopwatch(), config.training.steps
    calibration, training = list(run.calibration_loader()), list(run.training_loader())
    schedule = Schedule(calibration_batches=config.calibration.batches)
    callback = ZSSVDCallback.from_config(config.compression, schedule=schedule, recovery=recovery)
    needed = callback.batches_needed()
    dense = copy.deepcopy(run.model)
    run.evaluate("dense")

    batches = Batches(list(islice(cycle(calibration), needed)), training)
    fit = trainer(run, needed + steps, Measures(run, callback), callback)
    fit.fit(CausalLM(run.model), DataLoader(batches, batch_size=None))

    with watch("finetune_dense"):
        trainer(run, steps).fit(FineTuned(dense, recovery, run), DataLoader(training, batch_size=None))
    run.evaluate("dense_finetuned", dense)

    report = callback.report.within("model")
    report.seconds |= watch.seconds
    run.save(report, picture=True)
    Console().print(report.table())
    print(f"wrote the model, report.json, report.html and report.png to {run.output}")


if __name__ == "__main__":
    start(main, __doc__)
