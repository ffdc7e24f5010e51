"""Models of a measurement: folders beside their dense model, or shapes with random weights."""

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from zssvd_lightning._validation import require, require_count, require_one_of
from zssvd_lightning.app.bench.memory import is_full
from zssvd_lightning.app.run import recorded_evaluation
from zssvd_lightning.errors import ConfigError, ModelSourceError
from zssvd_lightning.hub.model_classes import class_named
from zssvd_lightning.layers.base import CompressedLinear, Dense, shape_of
from zssvd_lightning.layers.int8 import LARGEST_CODE
from zssvd_lightning.layers.low_rank import LowRankLinear
from zssvd_lightning.layers.registry import form_for
from zssvd_lightning.model.replace import inside_compressed, replace_module
from zssvd_lightning.model.targets import find_targets
from zssvd_lightning.selection.budget import Budget
from zssvd_lightning.selection.proportional import uniform_ranks
from zssvd_lightning.selection.storages import STORAGES
from zssvd_lightning.serialization.specs import specs_of
from zssvd_lightning.sources.models import load_model_config, load_weights

logger = logging.getLogger(__name__)

DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""Names under which configs of transformers keep the number of blocks."""

PER_BLOCK = ("layer_types", "mlp_layer_types")
"""Names under which configs keep a list with an entry for each block."""

SCALE = 0.02
"""Standard deviation of random weights."""


@dataclass(frozen=True)
class Contender:
    """Model to measure."""

    name: str
    source: str
    model: PreTrainedModel
    dense: bool
    """True for the model that others are compared with."""


def from_folders(folders: Sequence[str], dense: str | None, dtype: str, device: str) -> list[Contender]:
    """Load compressed models and, first, the dense model that they were compressed from.

    Args:
        folders: sources of models. A dense one is measured like the others.
        dense: source of the dense model; None for the one that the reports in the folders name.
        dtype: floating-point type of the weights.
        device: device to measure on.

    Raises:
        ModelSourceError: a model does not exist or cannot be read.
        SavedModelError: the content of a compressed folder does not match its config.
        ConfigError: no dense model is named, several are, or one of another shape; or the device is full.
    """
    names = ["dense", *_names(folders)]
    base = dense if dense is not None else _recorded_base(folders)
    found: list[Contender] = []
    for name, source in zip(names, [base, *folders], strict=True):
        logger.info("%s: %s", name, source)
        with _room_for(source, device):
            model = load_weights(source, dtype) if found or dense is not None else _loaded_base(source, dtype)
            nn.Module.to(model, device)
        nn.Module.eval(model)
        if not found and specs_of(model):
            raise ConfigError(f"{source} is to be the dense model, but has compressed layers; name another as --dense")
        if found:
            _refuse_other_shape(model, source, found[0])
        found.append(Contender(name, source, model, dense=not found))
    return found


def at_random(
    source: str,
    ratios: Sequence[float],
    storages: Sequence[str],
    dtype: str,
    device: str,
    layers: int | None = None,
) -> list[Contender]:
    """Build models from a config alone: a dense one, and one for each storage and ratio. Weights are random.

    Each target matrix gets the highest rank at which it keeps at most the share `1 - ratio` of its cost.

    Args:
        source: source of a model, or a file `config.json`.
        ratios: prune ratios.
        storages: storages by name, except those that choose bits by the loss.
        dtype: floating-point type of the weights.
        device: device to measure on.
        layers: number of blocks; None for that of the config.

    Raises:
        ModelSourceError: the config cannot be read, or no class is known for it.
        ConfigError: a ratio, storage or number of blocks is out of range; or the device is full.
        TargetError: the model has no layer to compress.
        BudgetError: a ratio asks for less than rank 1, or the storage alone reaches it.
    """
    for ratio in ratios:
        require(0 < ratio < 1, "ratio", ratio, "between 0 and 1")
    for storage in storages:
        require_one_of("storage", storage, list(STORAGES))
        if STORAGES[storage].in_8_bits is not None:
            raise ConfigError(f"storage {storage!r} chooses bits by the loss, which random weights do not have")
    config = _config(source, layers)
    found = []
    for shape in (None, *product(storages, ratios)):
        name = "dense" if shape is None else f"{shape[0]} {shape[1]:g}"
        with _room_for(name, device):
            model = _built(config, dtype, device)
            if shape is not None:
                compress_at_random(model, ratio=shape[1], storage=shape[0])
        nn.Module.eval(model)
        found.append(Contender(name, source, model, dense=shape is None))
    return found


def compress_at_random(model: nn.Module, ratio: float, storage: str) -> None:
    """Replace all targets by compressed layers with random values, at an equal share of cost, in place.

    Raises:
        TargetError: there is no layer to compress.
        BudgetError: a ratio asks for less than rank 1, or the storage alone reaches it.
    """
    targets = find_targets(model)
    budget = Budget({name: target.shape for name, target in targets.items()}, ratio, storage=storage)
    for name, rank in uniform_ranks(budget).items():
        if budget.is_low_rank(name, rank):
            replace_module(model, targets[name].module, random_layer(targets[name].module, rank, storage))


def random_layer(old: Dense, rank: int, storage: str) -> CompressedLinear:
    """Return a compressed layer of the shape of `old` with random values, in its final form.

    Args:
        old: dense layer.
        rank: rank k.
        storage: storage by name.
    """
    form = STORAGES[storage]
    new = form_for(form.layer, *shape_of(old)).like(old, rank=rank).to_empty(device=old.weight.device)
    fill_at_random(new)
    if form.rounded is not None and isinstance(new, LowRankLinear):
        return form.rounded(new)
    return new


@torch.no_grad()
def fill_at_random(layer: CompressedLinear) -> None:
    """Fill all values of a compressed layer: weights by a normal distribution, permutations by random ones."""
    for name, value in layer.state_dict().items():
        if name in layer.permutations:
            value.copy_(torch.randperm(len(value), device=value.device))
        elif value.dtype == torch.int8:
            value.random_(-LARGEST_CODE, LARGEST_CODE + 1)
        else:
            value.normal_(0, SCALE)
            if name == "scale":
                value.abs_().add_(SCALE / LARGEST_CODE)


def _recorded_base(folders: Sequence[str]) -> str:
    bases = {folder: recorded_evaluation(folder).get("dense") for folder in folders}
    named = {base for base in bases.values() if base is not None}
    if len(named) == 1:
        return str(named.pop())
    if named:
        told = ", ".join(f"{folder}: {base}" for folder, base in bases.items())
        raise ConfigError(f"the models come from several dense ones ({told}); name one as --dense, or run each apart")
    missing = [folder for folder in folders if not Path(folder).is_dir()]
    here = f"{', '.join(missing)} is no folder here; " if missing else ""
    raise ConfigError(f"{here}no report of {', '.join(folders)} names the dense model; name it as --dense MODEL")


def _loaded_base(source: str, dtype: str) -> PreTrainedModel:
    """Load the dense model that reports name, which may have moved since."""
    try:
        return load_weights(source, dtype)
    except ModelSourceError as error:
        raise ModelSourceError(f"{error}; the reports name it as the dense model; name another as --dense") from error


def _names(folders: Sequence[str]) -> list[str]:
    """Return short names of folders: their last parts, or the whole path where those are not unique."""
    short = [Path(folder).name or folder for folder in folders]
    alone = [name != "dense" and short.count(name) == 1 for name in short]
    names = [name if is_alone else folder for name, is_alone, folder in zip(short, alone, folders, strict=True)]
    if len(set(names)) < len(names):
        raise ConfigError(f"a model is named twice: {', '.join(names)}")
    return names


def _refuse_other_shape(model: PreTrainedModel, source: str, dense: Contender) -> None:
    """Raise ConfigError unless the dense model has every linear layer of a model, in the same shape."""
    theirs = {name: module for name, module in dense.model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    parts = inside_compressed(model)
    for name, layer in model.named_modules():
        if not isinstance(layer, (nn.Linear, Conv1D, CompressedLinear)) or id(layer) in parts:
            continue
        if name not in theirs or shape_of(theirs[name]) != shape_of(layer):
            there = f"is {shape_of(theirs[name])} there" if name in theirs else "is not there"
            raise ConfigError(
                f"{source} was not compressed from {dense.source}: its layer {name} is {shape_of(layer)}, and {there}; "
                "name the dense model as --dense MODEL"
            )


@contextmanager
def _room_for(source: str, device: str) -> Iterator[None]:
    """Turn an error that says that memory is full into a ConfigError that names the model."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_full(error):
            raise
        raise ConfigError(f"{device} has no memory left for {source} beside the other models; measure fewer") from error


def _config(source: str, layers: int | None) -> PreTrainedConfig:
    """Return the config of a dense model, with the number of blocks changed."""
    config = copy.deepcopy(load_model_config(source))
    if layers is None:
        return config
    text = config.get_text_config(decoder=True)
    name = next((name for name in DEPTHS if hasattr(text, name)), None)
    if name is None:
        raise ConfigError(f"--layers: the config of {source} has none of {', '.join(DEPTHS)}")
    require_count("layers", layers, 1, getattr(text, name))
    setattr(text, name, layers)
    for each in PER_BLOCK:
        if isinstance(values := getattr(text, each, None), list):
            setattr(text, each, values[:layers])
    return config


def _built(config: PreTrainedConfig, dtype: str, device: str) -> PreTrainedModel:
    """Return a dense model of a config with the initial weights of transformers."""
    named = class_named(next(iter(config.architectures or ()), None), config)
    builder: Any = AutoModelForCausalLM.from_config if named is None else named._from_config  # noqa: SLF001
    try:
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(0)
            model: PreTrainedModel = builder(copy.deepcopy(config), dtype=getattr(torch, dtype))
    except (ValueError, ImportError) as error:
        raise ModelSourceError(f"no model can be built from the config alone: {error}") from error
    return model
