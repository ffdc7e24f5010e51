"""Checkpoints of sharded models: what is in them without loading it, and a compression under way, saved in parts."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_parts
from torch.distributed.checkpoint.state_dict_saver import save as save_parts
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, empty

from zssvd_lightning.errors import CheckpointError

WEIGHTS = "state_dict."
"""What names of weights begin with in a distributed checkpoint of Lightning's."""
REST = "meta.pt"
"""The file of a distributed checkpoint in which Lightning keeps everything else."""
PARTS = "zssvd_parts"
"""The folder of a distributed checkpoint for what a compression under way holds in parts."""


def outline(path: Path, weights_only: bool | None) -> dict[str, Any]:
    """A checkpoint with tensors of the right shapes, but without their values."""
    if path.is_file():
        whole: dict[str, Any] = torch.load(path, map_location="meta", weights_only=weights_only)
        return whole
    rest: dict[str, Any] = torch.load(path / REST, map_location="meta", weights_only=weights_only)
    saved = FileSystemReader(path).read_metadata().state_dict_metadata
    weights: dict[str, Tensor] = {
        name.removeprefix(WEIGHTS): torch.empty(entry.size, device="meta")
        for name, entry in saved.items()
        if name.startswith(WEIGHTS) and isinstance(entry, TensorStorageMetadata)
    }
    return rest | {"state_dict": weights}


def save_with_parts(
    save: Callable[[dict[str, Any]], None], checkpoint: dict[str, Any], path: Path, *, first: bool
) -> None:
    """Saves a checkpoint, and beside it the tensors in parts that callbacks have in their states. Collective.

    Args:
        save: saves the rest.
        checkpoint: what Lightning has collected.
        path: its folder.
        first: whether this is the first process.
    """
    parts: dict[str, Tensor] = {}

    def name(tensor: DTensor) -> dict[str, Any]:
        parts[str(len(parts))] = tensor
        return {PARTS: str(len(parts) - 1), "split": tensor.placements[0].dim}  # type: ignore[attr-defined]

    if "callbacks" in checkpoint:
        named = _mapped(checkpoint["callbacks"], lambda entry: isinstance(entry, DTensor), name)
        checkpoint = checkpoint | {"callbacks": named}
    save(checkpoint)
    if parts:
        save_parts(parts, checkpoint_id=path / PARTS)
    elif first:
        shutil.rmtree(path / PARTS, ignore_errors=True)  # of a checkpoint that was here before


def with_parts(checkpoint: dict[str, Any], path: Path, mesh: DeviceMesh) -> dict[str, Any]:
    """A checkpoint with what each process is to hold of the tensors that any number of them have saved. Collective.

    Raises:
        CheckpointError: they are not there.
    """
    folder, parts = path / PARTS, dict[str, Tensor]()
    saved = FileSystemReader(folder).read_metadata().state_dict_metadata if folder.is_dir() else {}

    def make(named: dict[str, Any]) -> Tensor:
        if named[PARTS] not in saved:
            raise CheckpointError(f"{folder} does not hold all it should; resume from another checkpoint")
        entry: Any = saved[named[PARTS]]
        placements = [Shard(named["split"])]
        part = empty(*entry.size, dtype=entry.properties.dtype, device_mesh=mesh, placements=placements)
        return parts.setdefault(named[PARTS], part)

    if "callbacks" in checkpoint:
        is_name = lambda entry: isinstance(entry, dict) and PARTS in entry  # noqa: E731
        checkpoint = checkpoint | {"callbacks": _mapped(checkpoint["callbacks"], is_name, make)}
    if parts:
        load_parts(parts, checkpoint_id=folder)
    return checkpoint


def _mapped(entry: Any, is_leaf: Callable[[Any], bool], change: Callable[[Any], Any]) -> Any:
    """Nested dictionaries and lists with some entries changed."""
    if is_leaf(entry):
        return change(entry)
    if isinstance(entry, dict):
        return {key: _mapped(value, is_leaf, change) for key, value in entry.items()}
    if isinstance(entry, (list, tuple)):
        return type(entry)(_mapped(value, is_leaf, change) for value in entry)
    return entry
