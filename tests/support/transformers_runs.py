"""Runs of the Trainer of transformers."""

import torch
from torch.utils.data import Dataset, IterableDataset
from transformers import Trainer, TrainingArguments

from zssvd_lightning.layers.base import CompressedLinear

SETTINGS = {"preset": "zs-svd-line-search", "prune_ratio": 0.4, "calibration_batches": 3, "rank_multiple": 1}


class Tokens(Dataset):
    """Random rows of tokens, of which each is its own label."""

    def __init__(self, rows: int = 24) -> None:
        self.ids = torch.randint(90, (rows, 12), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class Padded(Tokens):
    """Rows of which some end in padding, so that batches differ in the number of their labels."""

    def __getitem__(self, index: int) -> dict:
        row = super().__getitem__(index)
        real = torch.arange(12) < 12 - index % 5
        labels = row["labels"].masked_fill(~real, -100)
        return {"input_ids": row["input_ids"], "attention_mask": real.long(), "labels": labels}


class Stream(IterableDataset):
    """The same rows as a stream."""

    def __init__(self, rows: int = 24) -> None:
        self.rows = Tokens(rows)

    def __iter__(self):
        return (self.rows[index] for index in range(len(self.rows)))


def trained(
    folder, model, callbacks, data=None, resume=None, evaluated=None, compute_metrics=None, trainer=Trainer, **settings
):
    arguments = {
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    } | settings
    args = TrainingArguments(output_dir=str(folder), **arguments)
    made = trainer(
        model,
        args,
        train_dataset=data or Tokens(),
        eval_dataset=evaluated,
        compute_metrics=compute_metrics,
        callbacks=callbacks,
    )
    made.train(resume_from_checkpoint=resume)
    return made


def low_rank(model):
    return {name: layer.spec for name, layer in model.named_modules() if isinstance(layer, CompressedLinear)}
