"""Checkpoints of sharded models: reading names and shapes without values, and saving compression state in parts."""

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

from zssvd_lightning._state_checks import PARTS
from zssvd_lightning.errors import CheckpointError

WEIGHTS = "state_dict."
"""Prefix of the names of weights in a distributed checkpoint from Lightning."""


REST = "meta.pt"
"""File of a distributed checkpoint in which Lightning stores everything that is not saved in parts."""


def outline(path: Path, weights_only: bool | None) -> dict[str, Any]:
    """Return a checkpoint whose tensors have the right shapes but no values.

    Args:
        path: a checkpoint file, or the folder of a distributed checkpoint.
        weights_only: passed to `torch.load`.
    """
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
    """Return a callback's state with names in place of its sharded tensors, and the sharded tensors by name.

    Args:
        state: nested dictionaries and lists.
        token: unique token of this checkpoint, so that tensors of another checkpoint are not mistaken for its tensors.
    """
    parts: dict[str, Tensor] = {}

    def name(tensor: DTensor) -> dict[str, Any]:
        names = f"{token}-{len(parts)}"
        parts[names] = tensor
        return {PARTS: names, "split": tensor.placements[0].dim}  # type: ignore[attr-defined]

    return _mapped(state, lambda entry: isinstance(entry, DTensor), name), parts


def save(parts: dict[str, Tensor], path: Path, *, first: bool) -> None:
    """Save sharded tensors in the folder of a checkpoint, replacing those of an older checkpoint. Collective.

    Args:
        parts: sharded tensors by name; empty if no compression is in progress.
        path: folder of the checkpoint.
        first: whether this is the first process.
    """
    if parts:
        save_parts(parts, checkpoint_id=path / PARTS)
    elif first:
        shutil.rmtree(path / PARTS, ignore_errors=True)


def put_back(state: Any, path: Path, mesh: DeviceMesh) -> Any:
    """Load the sharded tensors that a state names and return the state with them. Collective.

    The number of processes may differ from the number that saved the tensors.

    Args:
        state: state of a callback, from `taken_out`.
        path: folder of the checkpoint.
        mesh: mesh of the processes over which the tensors are split.

    Raises:
        CheckpointError: the tensors are not in the folder.
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
    """Return nested dictionaries and lists with `change` applied to the entries for which `is_leaf` is True."""
    if is_leaf(entry):
        return change(entry)
    if isinstance(entry, dict):
        return {key: _mapped(value, is_leaf, change) for key, value in entry.items()}
    if isinstance(entry, list):
        return [_mapped(value, is_leaf, change) for value in entry]
    return entry
