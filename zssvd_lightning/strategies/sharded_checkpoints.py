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


def taken_out(state: Any, token: str) -> tuple[Any, dict[str, Tensor]]:
    """A callback's state with names for the tensors in parts, and these by their names.

    Args:
        state: dictionaries and lists.
        token: of this checkpoint alone, so that parts of another are not taken for its own.
    """
    parts: dict[str, Tensor] = {}

    def name(tensor: DTensor) -> dict[str, Any]:
        names = f"{token}-{len(parts)}"
        parts[names] = tensor
        return {PARTS: names, "split": tensor.placements[0].dim}  # type: ignore[attr-defined]

    return _mapped(state, lambda entry: isinstance(entry, DTensor), name), parts


def save(parts: dict[str, Tensor], path: Path, *, first: bool) -> None:
    """Saves parts beside a checkpoint, in place of those of an older one. Collective.

    Args:
        parts: by name; none when no compression is under way.
        path: folder of the checkpoint.
        first: whether this is the first process.
    """
    if parts:
        save_parts(parts, checkpoint_id=path / PARTS)
    elif first:
        shutil.rmtree(path / PARTS, ignore_errors=True)


def put_back(state: Any, path: Path, mesh: DeviceMesh) -> Any:
    """A state with what each process is to hold of the tensors that any number of them have saved. Collective.

    Raises:
        CheckpointError: they are not there.
    """
    folder, parts = path / PARTS, dict[str, Tensor]()
    saved = FileSystemReader(folder).read_metadata().state_dict_metadata if folder.is_dir() else {}

    def make(named: dict[str, Any]) -> Tensor:
        if named[PARTS] not in saved:
            raise CheckpointError(
                f"{folder} is not what the checkpoint was saved with, as after a save that was cut short; resume from "
                "another checkpoint"
            )
        entry: Any = saved[named[PARTS]]
        placements = [Shard(named["split"])]
        part = empty(*entry.size, dtype=entry.properties.dtype, device_mesh=mesh, placements=placements)
        return parts.setdefault(named[PARTS], part)

    with_parts = _mapped(state, lambda entry: isinstance(entry, dict) and PARTS in entry, make)
    if parts:
        load_parts(parts, checkpoint_id=folder)
    return with_parts


def _mapped(entry: Any, is_leaf: Callable[[Any], bool], change: Callable[[Any], Any]) -> Any:
    """Nested dictionaries and lists with some entries changed."""
    if is_leaf(entry):
        return change(entry)
    if isinstance(entry, dict):
        return {key: _mapped(value, is_leaf, change) for key, value in entry.items()}
    if isinstance(entry, list):
        return [_mapped(value, is_leaf, change) for value in entry]
    return entry
