"""Memory layout of weights in which a CPU multiplies them by a single token in less time.

Shapes: weight W (m, n) of a linear layer, m outputs and n inputs.
"""

import logging
from collections import Counter
from itertools import chain

import torch
from torch import nn

from zssvd_lightning.errors import TargetError
from zssvd_lightning.layers.apart.experts import expert_lists

logger = logging.getLogger(__name__)

NARROWEST = 96
"""Smallest number of inputs of a layer whose layout is changed. At 64, columns take more time than rows."""


@torch.no_grad()
def arrange_for_decoding(model: nn.Module) -> int:
    """Store the weights (m, n) with more outputs than inputs column by column, in place, to generate text on a CPU.

    The product with a single token reads short rows at little more than half of the speed of the memory, and long
    columns at nearly all of it. Values, shapes and names of the weights stay the same: the model is saved, merged and
    exported as before; outputs change by rounding. Only the layout in memory differs, and it is not saved: call this
    after each load. Call it after training, because optimizers and strategies may hold the memory of the weights
    (FSDP2 refuses this layout). Memory of one weight is needed on top. A second call changes nothing.

    Arranged are the weights in float32 on the CPU of `nn.Linear` layers with at least 96 inputs, including the thin
    layers of compressed ones. Weights that are also used elsewhere, as those of a tied output embedding, stay as they
    are. What share of all numbers was arranged is logged.

    Args:
        model: any module, dense or compressed.

    Returns:
        The number of weights that are stored by columns.

    Raises:
        TargetError: `model` is no module.

    Example:
        >>> layer = nn.Linear(128, 512)
        >>> arrange_for_decoding(layer), layer.weight.stride()
        (1, (1, 512))
    """
    if not isinstance(model, nn.Module):
        raise TargetError(f"the model is of type {type(model).__name__}, but must be a torch.nn.Module")
    for _, experts in expert_lists(model):
        experts.unstack()
    uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    arranged = [
        module.weight
        for module in model.modules()
        if type(module) is nn.Linear and _gains(module.weight) and uses[id(module.weight)] == 1
    ]
    for weight in arranged:
        if weight.is_contiguous():
            weight.data = weight.data.t().contiguous().t()
    total = sum(p.numel() for p in chain(model.parameters(), model.buffers()))
    logger.info(
        "%d weights with %.0f%% of all numbers are stored by columns; others are not float32 on the CPU, have no more "
        "outputs than inputs or fewer than %d inputs, or are also used elsewhere",
        len(arranged),
        100 * sum(weight.numel() for weight in arranged) / max(total, 1),
        NARROWEST,
    )
    return len(arranged)


def _gains(weight: torch.Tensor) -> bool:
    """Return True for a weight (m, n) of which columns take less time than rows."""
    plain = type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.dtype == torch.float32
    return plain and weight.shape[0] > weight.shape[1] >= NARROWEST
