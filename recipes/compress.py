"""Compress a language model inside a Trainer: `python -m recipes.compress CONFIG [key=value ...]`.

The pieces are the ones of any Lightning project: a module, a data module, a Trainer. Copy it and put yours in. The rest
measures the dense and the compressed model side by side.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle, islice

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from zssvd_lightning import Run, RunConfig, Schedule, ZSSVDCallback, load_config
from zssvd_lightning._resources import shown_by
from zssvd_lightning.app.bench.models import from_folders
from zssvd_lightning.app.bench.picture import check_drawing
from zssvd_lightning.app.bench.record import recorded
from zssvd_lightning.app.bench.results import Results
from zssvd_lightning.app.bench.runner import measure
from zssvd_lightning.app.bench.settings import BenchSettings
from zssvd_lightning.app.command import print_table, start
from zssvd_lightning.app.progress import WholeBar
from zssvd_lightning.app.recovered import Batches, merged_recovery
from zssvd_lightning.errors import ConfigError
from zssvd_lightning.evaluation.perplexity import continuation
from zssvd_lightning.sources.models import longest_input

PROMPT = "The most important thing that a government can do for its people is"

NEW_TOKENS = 32

PENALTY = 1.2  # against loops, which greedy decoding of small models runs into; the same for both models

SPEED = BenchSettings(batches=(1,), contexts=(256,), tokens=16, repeats=3)

SHARES = {  # rough, for the time that is left
    "loading": 0.04,
    "perplexity, dense": 0.04,
    "perplexity_second, dense": 0.04,
    "batches": 0.46,
    "spectra": 0.09,  # once for every truncation
    "perplexity, compressed": 0.04,
    "perplexity_second, compressed": 0.04,
    "speed": 0.07,
}


class CausalLM(L.LightningModule):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model.train()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-5)


class Text(L.LightningDataModule):
    """Batches of calibration and corrections, and then those to train on."""

    def __init__(self, run: Run, calibration: int, training: int) -> None:
        super().__init__()
        self.run, self.calibration, self.training = run, calibration, training

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        calibration = list(islice(cycle(self.run.calibration_loader()), self.calibration))
        training = self.run.training_loader(self.training) if self.training else ()
        return DataLoader(Batches(calibration, training), batch_size=None)


class Counted(L.Callback):
    """Callback that counts the batches of a fit."""

    def __init__(self, advance: Callable[[int], object]) -> None:
        self.advance = advance

    def on_train_batch_end(self, *_: object) -> None:
        self.advance(1)


def main(path: str, *overrides: str) -> None:
    config = load_config(RunConfig, path, overrides)
    recovery = merged_recovery(config)
    if recovery is not None and recovery.minutes is not None:
        raise ConfigError("recovery.minutes is not for this recipe, whose bar counts steps; set training.steps instead")
    check_drawing()
    with quiet(), WholeBar(SHARES) as bar, shown_by(bar.step):
        with bar.step("loading", None, ""):
            run = Run(config)
        speed = fitting(run)
        run.evaluate("dense")
        dense_text = written(run)

        callback = ZSSVDCallback.from_config(
            run.config.compression,
            schedule=Schedule(calibration_batches=run.config.calibration.batches),
            recovery=recovery,
            held_out=None if recovery is None else run.held_out_loader(),
        )
        needed = callback.batches_needed()
        steps = 0 if recovery is None else run.config.training.steps
        with bar.step("batches", needed + steps, "batch") as advance:
            trainer = L.Trainer(
                max_steps=needed + steps,
                max_epochs=-1,
                precision=run.config.calibration.precision_on(run.model.device),
                gradient_clip_val=run.config.training.gradient_clip_val,
                callbacks=[callback, Counted(advance)],
                logger=False,
                enable_checkpointing=False,
                enable_model_summary=False,
                enable_progress_bar=False,
            )
            trainer.fit(CausalLM(run.model), Text(run, needed, steps))

        run.evaluate("compressed")
        report = callback.report.within("model")
        text = written(run)
        how = f"greedy, with a repetition penalty of {PENALTY}"
        report.continuations = {"prompt": PROMPT, "how": how, "dense": dense_text, "compressed": text}
        run.save(report, picture=True)
        with bar.step("speed", None, ""):
            models = from_folders([str(run.output)], None, speed.dtype, speed.device)
            results = Results(models, speed, *measure(models, speed, progress=False))
            recorded(results)

    print_table(report.table())
    print_table(speeds(results))
    console = Console()
    console.print(f"{run.config.model.source}: {report.coverage.summary(report.removed)}")
    console.print(f"[bold]{PROMPT}[/bold] ...\n  dense:      {dense_text!r}")
    console.print(f"  compressed: {text!r}")
    console.print(f"wrote the model, report.json, report.html and report.png to {run.output}")


def fitting(run: Run) -> BenchSettings:
    """Return the speed to measure, at a context that the model takes. Raises ConfigError if the prompt does not fit."""
    most = longest_input(run.model)
    if most is None:
        return SPEED
    needed = len(run.tokenizer(PROMPT).input_ids) + NEW_TOKENS
    if needed > most:
        raise ConfigError(f"PROMPT and its continuation have {needed} tokens, but the model takes at most {most}")
    return replace(SPEED, contexts=(min(SPEED.contexts[0], most - SPEED.tokens),))


def written(run: Run) -> str:
    """Return how the model continues the prompt."""
    return continuation(run.model, run.tokenizer, PROMPT, NEW_TOKENS, repetition_penalty=PENALTY)


def speeds(results: Results) -> Table:
    """Return a table of tokens per second, dense and compressed."""
    asked = results.settings
    table = Table(title=f"tokens per second, {asked.contexts[0]} tokens and {asked.tokens} more")
    for column in ("", "dense", "compressed"):
        table.add_column(column, justify="right" if column else "left")
    rows = results.rows()
    for phase in dict.fromkeys(row.phase for row in rows):
        found = [row.tokens_per_second for row in rows if row.phase == phase]
        table.add_row(phase, *("" if speed is None else f"{speed.median:.1f}" for speed in found))
    return table


@contextmanager
def quiet() -> Iterator[None]:
    """Leave the terminal to the bar: no messages below warnings, and no advice of Lightning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        logging.disable(logging.INFO)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


if __name__ == "__main__":
    start(main, __doc__)
