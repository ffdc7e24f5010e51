"""Scores that other callbacks store: reset of those of the dense model, and metrics of the compression as scores."""

import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path, PurePath

import lightning as L
import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint


def start_ranking_afresh(trainer: L.Trainer, so_far: str, prefix: str) -> None:
    """Reset the ranking of every `ModelCheckpoint` and `EarlyStopping`. Existing checkpoints stay on disk.

    Checkpoints that later ones would share a name with are renamed, such as `last.ckpt` to `last-dense.ckpt`. These are
    `last` and files whose name has no step, epoch or score in it; if Lightning numbers no files, all that are tracked.
    Current scores count as the worst until they are measured again.

    Args:
        trainer: the Trainer with the callbacks.
        so_far: name of the model's state until now, which is added to renamed checkpoints.
        prefix: start of the names of the metrics of this compression, which are up to date.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelCheckpoint):
            _release(callback, trainer, so_far)
        if isinstance(callback, EarlyStopping):
            stop_waiting(callback)
        if isinstance(callback, (ModelCheckpoint, EarlyStopping)):
            monitor = callback.monitor or prefix
            if monitor in trainer.callback_metrics and not monitor.startswith(prefix):
                _score_worst(callback, trainer)


def expect_own_metrics(trainer: L.Trainer, prefix: str) -> None:
    """Count metrics of the compression that other callbacks monitor as the worst until they are measured.

    Args:
        trainer: the Trainer with the callbacks.
        prefix: start of the names of these metrics.
    """
    for callback in _monitoring(trainer, prefix):
        if callback.monitor not in trainer.callback_metrics:
            _score_worst(callback, trainer)


def hold_early_stopping(trainer: L.Trainer, prefix: str | None = None) -> None:
    """Keep `EarlyStopping` from counting scores that cannot improve while no weight changes.

    Args:
        trainer: the Trainer with the callbacks.
        prefix: hold only those that monitor a metric that begins so, of a compression that has not started.
    """
    for callback in trainer.callbacks if prefix is None else _monitoring(trainer, prefix):  # type: ignore[attr-defined]
        if isinstance(callback, EarlyStopping):
            stop_waiting(callback)


def _monitoring(trainer: L.Trainer, prefix: str) -> list[ModelCheckpoint | EarlyStopping]:
    """Return the callbacks that monitor a metric whose name begins so."""
    return [
        callback
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(callback, (ModelCheckpoint, EarlyStopping)) and (callback.monitor or "").startswith(prefix)
    ]


def _score_worst(callback: ModelCheckpoint | EarlyStopping, trainer: L.Trainer) -> None:
    """Set the metric that a callback monitors to the worst finite value."""
    largest = torch.finfo(torch.float32).max
    trainer.callback_metrics[str(callback.monitor)] = torch.tensor(largest if callback.mode == "min" else -largest)


def stop_waiting(stopping: EarlyStopping) -> None:
    """Reset `EarlyStopping`, so that the next score counts as the first."""
    stopping.wait_count = 0
    stopping.best_score = _worst(stopping.mode)


def _release(checkpoint: ModelCheckpoint, trainer: L.Trainer, so_far: str) -> None:
    """Clear the tracked files and scores, so that later checkpoints do not delete or overwrite existing files."""
    if trainer.is_global_zero:
        ranked = {checkpoint.best_model_path, *checkpoint.best_k_models}
        fixed = not checkpoint._enable_version_counter or "{" not in (checkpoint.filename or "{")  # noqa: SLF001
        _set_aside({checkpoint.last_model_path} | (ranked if fixed else set()), so_far)
    trainer.strategy.barrier("zssvd_set_aside")
    checkpoint.best_k_models = {}
    checkpoint.kth_best_model_path = ""
    checkpoint.kth_value = _worst(checkpoint.mode)
    checkpoint.best_model_path = ""
    checkpoint.best_model_score = None
    checkpoint.current_score = None
    checkpoint.last_model_path = ""


def _set_aside(paths: set[str], so_far: str) -> None:
    """Rename checkpoints that later ones of the same name would overwrite. Links go on leading to the same file."""
    links = {path: os.path.realpath(path) for path in paths if Path(path).is_symlink()}
    moved = {os.path.realpath(path): _renamed(path, so_far) for path in paths - links.keys() if path}
    for path, target in links.items():
        link = Path(_free_name(path, so_far))
        Path(path).unlink()
        link.symlink_to(os.path.relpath(moved.get(target) or target, link.parent))


def _renamed(path: str, so_far: str) -> str | None:
    """Rename a checkpoint and return its new name; None if there is no such file."""
    files = get_filesystem(path)
    if not files.exists(path):
        return None
    name = _free_name(path, so_far)
    files.mv(path, name, recursive=True)
    return name


def _free_name(path: str, so_far: str) -> str:
    files, name = get_filesystem(path), PurePath(path)
    names = (str(name.with_name(f"{name.stem}-{so_far}{version}{name.suffix}")) for version in _versions())
    return next(free for free in names if not files.exists(free))


def _versions() -> Iterator[str]:
    yield ""
    yield from (f"-v{number}" for number in count(1))


def _worst(mode: str) -> torch.Tensor:
    return torch.tensor(torch.inf if mode == "min" else -torch.inf)
