"""Layers that PEFT wraps, outside the factors of low-rank layers."""

import sys
from collections.abc import Iterator

from torch import nn
from transformers.pytorch_utils import Conv1D

from zssvd_lightning.layers.base import CompressedLinear
from zssvd_lightning.model.replace import inside_compressed

MERGE_FIRST = (
    "an adapter on it could not be merged into low-rank factors. Merge it first (model = model.merge_and_unload(), or "
    "for adapters injected into a model, merge() every adapter layer and put its get_base_layer() in its place), or "
    "compress the model without adapters and train the factors afterward with LoRARecovery"
)
"""Why layers with adapters are not compressed, and what to do instead."""


def wraps_by_peft(module: nn.Module) -> bool:
    """Return whether PEFT made a module to adapt or replace another; False while peft is not imported."""
    tuners, others = sys.modules.get("peft.tuners.tuners_utils"), sys.modules.get("peft.utils.other")
    if tuners is None or others is None:
        return False
    return isinstance(module, (tuners.BaseTunerLayer, others.AuxiliaryTrainingWrapper))


def linear_layers_in_peft(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield all linear layers inside modules of PEFT: dense, compressed, and the adapters' own.

    Adapters on the factors of low-rank layers are left out; `adapters` handles those.

    Yields:
        The name of the outermost module of PEFT, and the name and module of the linear layer.
    """
    parts, outer = inside_compressed(model), ""
    for name, module in model.named_modules():
        if id(module) in parts:
            continue
        if not (outer and name.startswith(f"{outer}.")):
            outer = name if wraps_by_peft(module) else ""
        if outer and isinstance(module, (nn.Linear, Conv1D, CompressedLinear)):
            yield outer, name, module
