"""What other callbacks remember of the dense model's scores, and how they are made to forget it."""

from pathlib import PurePath

import lightning as L
import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint


def start_ranking_afresh(trainer: L.Trainer) -> None:
    """Makes every `ModelCheckpoint` and `EarlyStopping` rank from nothing; checkpoints so far stay on disk.

    Later checkpoints get names of their own (`last-v1.ckpt` beside `last.ckpt`, as Lightning numbers them).
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelCheckpoint):
            _release(callback, trainer)
        if isinstance(callback, EarlyStopping):
            stop_waiting(callback)


def hold_early_stopping(trainer: L.Trainer) -> None:
    """Keeps `EarlyStopping` from counting a score that cannot improve, since no weight changes between batches."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EarlyStopping):
            stop_waiting(callback)


def stop_waiting(stopping: EarlyStopping) -> None:
    """The next score counts as the first."""
    stopping.wait_count = 0
    stopping.best_score = _worst(stopping.mode)


def _release(checkpoint: ModelCheckpoint, trainer: L.Trainer) -> None:
    """Forgets the files and scores, so that no file is deleted or overwritten by what comes later."""
    if not checkpoint._enable_version_counter and trainer.is_global_zero:  # noqa: SLF001
        tracked = {checkpoint.last_model_path, checkpoint.best_model_path, *checkpoint.best_k_models}
        for path in filter(None, tracked):
            _set_aside(path)
    checkpoint.best_k_models = {}
    checkpoint.kth_best_model_path = ""
    checkpoint.kth_value = _worst(checkpoint.mode)
    checkpoint.best_model_path = ""
    checkpoint.best_model_score = None
    checkpoint.current_score = None
    checkpoint.last_model_path = ""


def _set_aside(path: str) -> None:
    """Renames a checkpoint that the next one of its name would overwrite."""
    files = get_filesystem(path)
    name = PurePath(path)
    if files.exists(path):
        files.mv(path, str(name.with_name(f"{name.stem}-dense{name.suffix}")), recursive=True)


def _worst(mode: str) -> torch.Tensor:
    return torch.tensor(torch.inf if mode == "min" else -torch.inf)
