"""Dense stand-ins for low-rank layers, so that a model is compressed a second time like a dense one.

Shapes: W (m, n).
"""

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from zssvd_lightning._numerics import exact_products
from zssvd_lightning.errors import TargetError
from zssvd_lightning.layers.base import CompressedLinear, Dense, carry_hooks
from zssvd_lightning.layers.low_rank import LowRankLinear
from zssvd_lightning.layers.registry import Factored, dense_like
from zssvd_lightning.layers.storage import Kept, Present
from zssvd_lightning.model.peft_layers import wraps_by_peft
from zssvd_lightning.model.replace import replace_module
from zssvd_lightning.model.targets import Patterns, is_selected, refuse_adapted

logger = logging.getLogger(__name__)


def low_rank_targets(model: nn.Module, include: Patterns = None, ignore: Patterns = None) -> dict[str, Factored]:
    """Return the selected layers that are low-rank already, by qualified name in module order.

    Args:
        model: any module.
        include: as in `find_targets`.
        ignore: as in `find_targets`.

    Raises:
        TargetError: a selected layer cannot be compressed again, or has an adapter of PEFT. The message says why, and
            what to do.
    """
    refuse_adapted(model, include, ignore)
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    found: dict[str, Factored] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, CompressedLinear) or not is_selected(name, include, ignore):
            continue
        reason = _why_not(layer, owners)
        if reason is not None or not isinstance(layer, Factored):
            raise TargetError(f"{name} ({type(layer).__name__}) is compressed already, and {reason}; or add it to ignore")
        found[name] = layer
    return found


@contextmanager
def dense_meanwhile(
    model: nn.Module, include: Patterns = None, ignore: Patterns = None
) -> Iterator[dict[str, Present]]:
    """Put a dense layer of the same weight in place of each selected low-rank layer, within the context.

    On any exit, every stand-in that is still in the model is replaced by its low-rank layer, whose factors are exactly
    as before. The stand-ins take the memory of the dense weights.

    Args:
        model: any module.
        include: as in `find_targets`.
        ignore: as in `find_targets`.

    Yields:
        Rank and numbers of the low-rank layers, by qualified name.

    Raises:
        TargetError: see `low_rank_targets`.
    """
    layers = low_rank_targets(model, include, ignore)
    stand_ins: list[tuple[Dense, Factored]] = []
    try:
        for layer in layers.values():
            stand_ins.append((_stand_in(layer), layer))
            replace_module(model, layer, stand_ins[-1][0])
        if layers:
            size = sum(stand_in.weight.nbytes for stand_in, _ in stand_ins)
            logger.info("%d low-rank layers are dense during the compression (%.1f MB)", len(layers), size / 1e6)
        yield {name: Present(layer.rank, _numbers_of(layer)) for name, layer in layers.items()}
    finally:
        for stand_in, layer in stand_ins:
            replace_module(model, stand_in, layer)


def _why_not(layer: CompressedLinear, owners: Counter[int]) -> str | None:
    """Return why a layer cannot be compressed again and what to do, or None if it can."""
    if not isinstance(layer, Factored):
        return (
            "its form has no factors to truncate again, as with 8 bits; compress the model from before it was quantized"
        )
    if isinstance(layer, LowRankLinear) and layer.adapter is not None:
        return "has an adapter from a recovery; merge_adapters(model) first"
    if any(wraps_by_peft(part) for part in layer.modules()):
        return "has an adapter of PEFT on its factors; model = model.merge_and_unload() first"
    if any(isinstance(parameter, DTensor) for parameter in layer.parameters()):
        return "its factors are spread over processes; compress the model on one process"
    if any(owners[id(parameter)] > 1 for parameter in layer.parameters()):
        return "one of its factors is tied to another module's, and replacing it would untie them"
    return None


@torch.no_grad()
def _stand_in(layer: Factored) -> Dense:
    """Return a dense layer with the weight, hooks and training mode of `layer`, which shares its bias."""
    new = dense_like(layer).to_empty(device=next(layer.parameters()).device)
    with exact_products(), torch.autocast(new.weight.device.type, enabled=False):
        W = layer.weight
    new.weight.copy_(W.T if isinstance(new, Conv1D) else W)
    new.bias = layer.bias
    carry_hooks(new, layer)
    return new


def _numbers_of(layer: Factored) -> Kept:
    """Count the numbers that store the weight of a low-rank layer."""
    wide = sum(p.numel() for name, p in layer.named_parameters() if name.rpartition(".")[2] != "bias")
    return Kept(wide=wide, beside=sum(buffer.nbytes for buffer in layer.buffers()), products=wide)
