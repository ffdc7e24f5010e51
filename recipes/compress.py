"""Compress a language model inside a Trainer: `python -m recipes.compress CONFIG [key=value ...]`.

The pieces are the ones of any Lightning project: a module, a data module, a Trainer. Copy it and put yours in.
"""

import math

import lightning as L
import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from zssvd_lightning import Run, RunConfig, Schedule, ZSSVDCallback, load_config
from zssvd_lightning.app.command import start
from zssvd_lightning.evaluation.perplexity import continuation

PROMPT = "The state of the union is"


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


class CalibrationText(L.LightningDataModule):
    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self.run.calibration_loader()


def main(path: str, *overrides: str) -> None:
    run = Run(load_config(RunConfig, path, overrides))
    run.evaluate("dense")
    dense_text = continuation(run.model, run.tokenizer, PROMPT)

    callback = ZSSVDCallback.from_config(
        run.config.compression, schedule=Schedule(calibration_batches=run.config.calibration.batches)
    )
    batches = callback.batches_needed(len(run.calibration_loader()))
    trainer = L.Trainer(
        max_epochs=math.ceil(batches / len(run.calibration_loader())),
        max_steps=batches,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(CausalLM(run.model), CalibrationText(run))

    run.evaluate("compressed")
    report = callback.report.within("model")
    text = continuation(run.model, run.tokenizer, PROMPT)
    report.continuations = {"prompt": PROMPT, "dense": dense_text, "compressed": text}
    run.save(report, picture=True)
    console = Console()
    console.print(report.table())
    console.print(f"[bold]{PROMPT}[/bold] ...\n  dense:      {dense_text!r}")
    console.print(f"  compressed: {text!r}")
    console.print(f"wrote the model, report.json, report.html and report.png to {run.output}")


if __name__ == "__main__":
    start(main, __doc__)
