"""One training run with compression in it, as a process of its own that can be killed at any hook and resumed."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torchdata.stateful_dataloader import StatefulDataLoader

from support.callbacks import scheduled
from support.models import CausalLM, token_batches, trainer
from support.processes import context
from zssvd_lightning import ZSSVDCallback

HOOKS = (
    "on_train_batch_start",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "on_train_batch_end",
)


class Scheduled(CausalLM):
    """With momentum and a schedule, both of which a resumed run must get back."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.7), "interval": "step"}]


class Diary(L.Callback):
    """Writes the loss of every batch to a file, at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        batches = trainer.fit_loop.epoch_loop.total_batch_idx
        with self.path.open("a") as file:
            file.write(json.dumps([batches, outputs["loss"].item()]) + "\n")


class Kill(L.Callback):
    """Kills its process the n-th time a hook runs in one of the phases given (any when None)."""

    def __init__(self, after: int, hook: str, phases: list[str] | None = None) -> None:
        self.left = after
        self.phases = phases
        setattr(self, hook, self._kill)

    def _kill(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        (compression,) = [c for c in trainer.callbacks if isinstance(c, ZSSVDCallback)]
        self.left -= self.phases is None or compression.phase in self.phases
        if self.left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)


def run(
    folder: Path,
    callback: dict[str, Any],
    settings: dict[str, Any],
    kill: tuple[int, str, list[str] | None] | None = None,
) -> None:
    """Trains, from the newest checkpoint when there is one, and leaves `end.pt`."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = Scheduled()
    short = {"prune_ratio": 0.3, "calibration_batches": 5, "correction_batches": 3, "progress": False}
    compression = ZSSVDCallback(**scheduled({"preset": "zs-svd-line-search"} | short | callback))
    saving = ModelCheckpoint(folder, every_n_train_steps=1, save_last=True)
    loader = StatefulDataLoader(token_batches(160), batch_size=None)
    callbacks = [compression, Diary(folder / "losses.jsonl"), saving, *([Kill(*kill)] if kill else [])]
    fitted = trainer(*callbacks, **({"max_steps": 36, "enable_checkpointing": True} | settings))
    fitted.fit(module, loader, ckpt_path="last")
    torch.save(
        {
            "weights": module.state_dict(),
            "optimizer": fitted.optimizers[0].state_dict(),
            "rate": fitted.lr_scheduler_configs[0].scheduler.get_last_lr(),
            "ranks": {name: layer.rank for name, layer in compression.report.layers.items()},
            "report": compression.report.losses,
        },
        folder / "end.pt",
    )


def start(
    folder: Path,
    callback: dict[str, Any],
    settings: dict[str, Any],
    kill: tuple[int, str, list[str] | None] | None = None,
) -> int:
    """`run` in a new process; returns its exit code, negative for the signal that ended it."""
    process = context().Process(target=run, args=(folder, callback, settings, kill))
    process.start()
    process.join()
    return process.exitcode


def losses(folder: Path) -> list[tuple[int, float]]:
    """(batch, loss) of every batch of every process so far."""
    return [tuple(json.loads(line)) for line in (folder / "losses.jsonl").read_text().splitlines()]
