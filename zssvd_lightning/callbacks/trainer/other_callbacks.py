"""Reset of the scores of the dense model that other callbacks store."""

from collections.abc import Iterator
from itertools import count
from pathlib import PurePath

import lightning as L
import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint


def start_ranking_afresh(trainer: L.Trainer, so_far: str) -> None:
    """Reset the ranking of every `ModelCheckpoint` and `EarlyStopping`. Existing checkpoints stay on disk.

    Later checkpoints get new names, numbered by Lightning (`last-v1.ckpt` in addition to `last.ckpt`). If numbering is
    disabled, existing checkpoints are renamed. Current scores count as the worst until they are measured again.

    Args:
        trainer: the Trainer with the callbacks.
        so_far: name of the model's state until now, which is added to renamed checkpoints.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelCheckpoint):
            _release(callback, trainer, so_far)
        if isinstance(callback, EarlyStopping):
            stop_waiting(callback)
        if isinstance(callback, (ModelCheckpoint, EarlyStopping)) and callback.monitor in trainer.callback_metrics:
            largest = torch.finfo(torch.float32).max
            trainer.callback_metrics[callback.monitor] = torch.tensor(largest if callback.mode == "min" else -largest)


def hold_early_stopping(trainer: L.Trainer) -> None:
    """Keep `EarlyStopping` from counting scores that cannot improve while no weight changes."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EarlyStopping):
            stop_waiting(callback)


def stop_waiting(stopping: EarlyStopping) -> None:
    """Reset `EarlyStopping`, so that the next score counts as the first."""
    stopping.wait_count = 0
    stopping.best_score = _worst(stopping.mode)


def _release(checkpoint: ModelCheckpoint, trainer: L.Trainer, so_far: str) -> None:
    """Clear the tracked files and scores, so that later checkpoints do not delete or overwrite existing files."""
    if not checkpoint._enable_version_counter and trainer.is_global_zero:  # noqa: SLF001
        tracked = {checkpoint.last_model_path, checkpoint.best_model_path, *checkpoint.best_k_models}
        for path in filter(None, tracked):
            _set_aside(path, so_far)
    checkpoint.best_k_models = {}
    checkpoint.kth_best_model_path = ""
    checkpoint.kth_value = _worst(checkpoint.mode)
    checkpoint.best_model_path = ""
    checkpoint.best_model_score = None
    checkpoint.current_score = None
    checkpoint.last_model_path = ""


def _set_aside(path: str, so_far: str) -> None:
    """Rename a checkpoint that a later one of the same name would overwrite."""
    files, name = get_filesystem(path), PurePath(path)
    if not files.exists(path):
        return
    names = (name.with_name(f"{name.stem}-{so_far}{version}{name.suffix}") for version in _versions())
    files.mv(path, next(str(free) for free in names if not files.exists(str(free))), recursive=True)


def _versions() -> Iterator[str]:
    yield ""
    yield from (f"-v{number}" for number in count(1))


def _worst(mode: str) -> torch.Tensor:
    return torch.tensor(torch.inf if mode == "min" else -torch.inf)
