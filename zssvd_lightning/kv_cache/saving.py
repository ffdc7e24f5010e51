"""The file of a folder that holds the bases of a low-rank cache."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig

from zssvd_lightning._files import check_file, checked_path, list_in_manifest, replacing_file
from zssvd_lightning.errors import SavedModelError
from zssvd_lightning.kv_cache.bases import Bases
from zssvd_lightning.kv_cache.cache_layer import LayerBases
from zssvd_lightning.kv_cache.observation import compressible_layers

FILE = "kv_cache.safetensors"

VERSION = "1"
"""Version of the format."""

PARTS = ("down", "up", "mean", "ranks")
"""Tensors of the bases of the keys or values of a layer."""


def save(bases: Mapping[int, LayerBases], config: PreTrainedConfig, folder: str | Path) -> Path:
    """Write bases into a folder and return the file; errors as in `LowRankCache.save`."""
    file = check_file(Path(folder) / FILE)
    tensors: dict[str, Tensor] = {}
    for layer, pair in bases.items():
        for name, part in zip(LayerBases._fields, pair, strict=True):
            ranks = torch.tensor(part.ranks)
            for key, tensor in zip(PARTS, (part.down, part.up, part.mean, ranks), strict=True):
                tensors[f"{layer}.{name}.{key}"] = tensor.contiguous().cpu()
    metadata = {"format": "pt", "version": VERSION, "model_type": config.model_type}
    with replacing_file(file) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    list_in_manifest(file)
    return file


def load(folder: str | Path, config: PreTrainedConfig) -> dict[int, LayerBases]:
    """Return the bases in a folder for a model of this config; errors as in `LowRankCache.load`."""
    path = checked_path(Path(folder) / FILE, SavedModelError, "folder")
    if not path.is_file():
        raise SavedModelError(f"{folder} has no {FILE}; calibrate a LowRankCache and save it there")
    try:
        with safe_open(path, framework="pt") as opened:
            told = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  it is no mapping
    except (SafetensorError, OSError) as error:
        raise SavedModelError(f"{path} cannot be read: {error}; copy the folder again") from error
    if told.get("version") != VERSION:
        raise SavedModelError(f"{path} is of version {told.get('version')!r}, but {VERSION!r} is read; calibrate again")
    if told.get("model_type") != config.model_type:
        raise SavedModelError(
            f"{path} is for a model of type {told.get('model_type')!r}, but the model is {config.model_type!r}; "
            "calibrate on this model"
        )
    layers = sorted({name.partition(".")[0] for name in tensors})
    possible = {str(layer) for layer in compressible_layers(config)}
    if not layers or set(layers) - possible:
        raise SavedModelError(
            f"{path} is for the layers {', '.join(layers)}, but the model caches all tokens in {len(possible)}: "
            f"{', '.join(sorted(possible, key=int))}; calibrate on this model"
        )
    return {int(layer): _of_layer(path, layer, tensors) for layer in sorted(layers, key=int)}


def _of_layer(path: Path, layer: str, tensors: Mapping[str, Tensor]) -> LayerBases:
    return LayerBases(*(_bases(path, f"{layer}.{name}", tensors) for name in LayerBases._fields))


def _bases(path: Path, name: str, tensors: Mapping[str, Tensor]) -> Bases:
    found = [tensors.get(f"{name}.{key}") for key in PARTS]
    present = [tensor for tensor in found if tensor is not None]
    if len(present) < len(PARTS) or not _fit(*present):
        shapes = {key: None if each is None else tuple(each.shape) for key, each in zip(PARTS, found, strict=True)}
        raise SavedModelError(f"{path} has bases {name} that do not fit together: {shapes}; copy the folder again")
    down, up, mean, ranks = present
    return Bases(down.float(), up.float(), mean.float(), tuple(ranks.tolist()))


def _fit(down: Tensor, up: Tensor, mean: Tensor, ranks: Tensor) -> bool:
    """Return True if tensors are bases: ranks (H,) of at most d, mean (H, d), down and up (R, d), all finite."""
    if mean.dim() != 2 or ranks.shape != mean.shape[:1] or ranks.dtype != torch.int64:
        return False
    possible = bool(((ranks >= 1) & (ranks <= mean.shape[1])).all())
    shape = (int(ranks.sum()), mean.shape[1])
    finite = all(tensor.is_floating_point() and bool(tensor.isfinite().all()) for tensor in (down, up, mean))
    return possible and finite and tuple(down.shape) == tuple(up.shape) == shape
