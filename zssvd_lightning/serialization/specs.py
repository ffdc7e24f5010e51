"""Describe the compressed layers of a model in plain values, and rebuild them from the description."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from zssvd_lightning.errors import SavedModelError
from zssvd_lightning.layers.base import CompressedLinear
from zssvd_lightning.layers.int8 import Int8LowRankLinear
from zssvd_lightning.layers.registry import KINDS, Factored, layer_like
from zssvd_lightning.model.replace import replace_module


def specs_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Kind and sizes of every compressed layer in `model`, by qualified name."""
    return {name: module.spec for name, module in model.named_modules() if isinstance(module, CompressedLinear)}


def ranks_of(model: nn.Module) -> dict[str, int]:
    """Rank of every layer of low rank in `model`, by qualified name."""
    low_rank = Factored | Int8LowRankLinear
    return {name: module.rank for name, module in model.named_modules() if isinstance(module, low_rank)}


def rebuild(model: nn.Module, specs: Mapping[str, Mapping[str, Any]]) -> None:
    """Replaces the dense layers named in `specs` by uninitialized compressed ones, in place.

    Raises:
        SavedModelError: a name is not a linear layer of the model, or there is no such kind of layer.
    """
    modules = dict(model.named_modules())
    for name, spec in specs.items():
        old = modules.get(name)
        if not isinstance(old, (nn.Linear, Conv1D)):
            raise SavedModelError(f"the config has {name} compressed, but the model has no linear layer there")
        if spec.get("kind") not in KINDS:
            raise SavedModelError(
                f"the config has {name} as {spec.get('kind')!r}, this release knows {', '.join(KINDS)}; upgrade "
                "zssvd-lightning"
            )
        try:
            new = layer_like(old, spec)
        except (TypeError, RuntimeError) as error:
            raise SavedModelError(f"the config has {name} as {dict(spec)}, which is no such layer: {error}") from error
        replace_module(model, old, new.to_empty(device=old.weight.device))
