"""Layers of every form at a share of the bytes, to be measured alone.

Shapes: a layer is (m, n): outputs, inputs.
"""

import inspect
from bisect import bisect_right
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from zssvd_lightning.app.bench.counts import weight_bytes
from zssvd_lightning.app.bench.models import fill_at_random
from zssvd_lightning.layers.base import CompressedLinear
from zssvd_lightning.layers.registry import KINDS


def layers_at(
    m: int, n: int, kept: float, dtype: torch.dtype, device: str | torch.device
) -> Iterator[tuple[str, nn.Module]]:
    """Yield a dense layer, and one of every form that has a rank, by name, without bias and with random values.

    The rank is the highest at which the layer has at most this share of the bytes. A form whose rank would be 0 is left
    out. Forms that can leave out the order of their outputs are measured with it and without.

    Args:
        m: number of outputs.
        n: number of inputs.
        kept: share of the bytes of the dense layer.
        dtype: floating-point type.
        device: device to put the layers on.
    """
    old = nn.Linear(n, m, bias=False, device="meta", dtype=dtype)
    yield "dense", nn.Linear(n, m, bias=False, device=device, dtype=dtype).eval()
    for kind, form in KINDS.items():
        takes = inspect.signature(form).parameters
        if "rank" not in takes:
            continue
        for name, sizes in _variants(kind, "ordered" in takes):
            size = partial(_bytes_at, form, old, sizes)
            rank = bisect_right(range(min(m, n)), kept * weight_bytes(old), key=size) - 1
            if rank > 0:
                layer = form.like(old, rank=rank, **sizes).to_empty(device=device)
                fill_at_random(layer)
                yield name, layer.eval()


def _variants(kind: str, orders: bool) -> list[tuple[str, dict[str, bool]]]:
    if not orders:
        return [(kind, {})]
    return [(f"{kind} {'ordered' if ordered else 'unordered'}", {"ordered": ordered}) for ordered in (False, True)]


def _bytes_at(form: type[CompressedLinear], old: nn.Linear, sizes: dict[str, Any], rank: int) -> int:
    return weight_bytes(form.like(old, rank=rank, **sizes))
