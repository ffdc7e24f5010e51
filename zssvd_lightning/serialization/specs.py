"""Plain-value descriptions of the compressed layers of a model, and rebuilding layers from them."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from zssvd_lightning.errors import SavedModelError
from zssvd_lightning.layers.apart.attention import project
from zssvd_lightning.layers.apart.convolutions import unfold
from zssvd_lightning.layers.apart.experts import take_apart
from zssvd_lightning.layers.apart.grouped import unfold_groups
from zssvd_lightning.layers.apart.recurrent import separate_recurrences
from zssvd_lightning.layers.apart.removed import forget_removed
from zssvd_lightning.layers.base import CompressedLinear
from zssvd_lightning.layers.int8 import Int8LowRankLinear
from zssvd_lightning.layers.registry import KINDS, Factored, layer_like
from zssvd_lightning.model.replace import replace_module
from zssvd_lightning.selection.storages import STORAGES


def specs_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the kind and sizes of every compressed layer in `model`, by qualified name."""
    return {name: module.spec for name, module in model.named_modules() if isinstance(module, CompressedLinear)}


def ranks_of(model: nn.Module) -> dict[str, int]:
    """Return the rank of every low-rank layer in `model`, by qualified name."""
    low_rank = Factored | Int8LowRankLinear
    return {name: module.rank for name, module in model.named_modules() if isinstance(module, low_rank)}


def rebuild(model: nn.Module, specs: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace the dense layers named in `specs` by uninitialized compressed layers, in place.

    Stacked experts, attentions and recurrent modules are taken apart, and convolutions unfolded, where `specs` name
    their matrices.

    Args:
        model: the dense model.
        specs: kind and sizes of each compressed layer, by qualified name.

    Raises:
        SavedModelError: a name is not a linear layer of the model, the kind or the sizes of a layer are invalid, or an
            expert is removed whose router is not found.
    """
    take_apart(model, specs)
    unfold(model, specs)
    unfold_groups(model, specs)
    project(model, specs)
    separate_recurrences(model, specs)
    modules = dict(model.named_modules())
    for name, spec in specs.items():
        old = modules.get(name)
        if not isinstance(old, (nn.Linear, Conv1D)):
            raise SavedModelError(f"the config has {name} compressed, but the model has no linear layer there")
        kind = spec.get("kind")
        if kind not in list(KINDS):
            STORAGES.loaded()
        if kind not in list(KINDS):
            raise SavedModelError(
                f"the config has {name} as {kind!r}, but only {', '.join(KINDS)} are known here; import "
                "the package that registers this storage, or upgrade zssvd-lightning"
            )
        try:
            new = layer_like(old, spec)
        except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            raise SavedModelError(f"the config has {name} as {dict(spec)}, which is no such layer: {error}") from error
        replace_module(model, old, new.to_empty(device=old.weight.device))
    try:
        forget_removed(model)
    except ValueError as error:
        raise SavedModelError(f"the config does not fit the model: {error}") from error
