"""Bytes and floating-point operations of a model: what its speed is bound by."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of the parameters and saved buffers of a model. Tied weights count once."""
    return sum(_saved(model).values())


def bytes_read(model: nn.Module) -> int:
    """Return the bytes of weights that a decode step reads: all but embedding tables, of which it reads single rows.

    A table that is also the weight of another layer, such as a tied output embedding, is read as a whole. All experts
    of a layer count as read, which is an upper bound at small batches.
    """
    other = {
        id(value)
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for value in module.parameters(recurse=False)
    }
    tables = {
        id(module.weight): module.weight
        for module in model.modules()
        if isinstance(module, nn.Embedding) and id(module.weight) not in other
    }
    return weight_bytes(model) - sum(map(_bytes, tables.values()))


def cache_bytes(cache: Any) -> int:
    """Return the bytes of floating-point values in a cache of transformers."""
    return sum(
        _bytes(value)
        for layer in cache.layers
        for value in vars(layer).values()
        if isinstance(value, Tensor) and value.is_floating_point()
    )


def flops_of(function: Callable[[], object]) -> int:
    """Return the floating-point operations of products, convolutions and attention in a call of `function`.

    A multiply-add counts as two. Attention counts all pairs of positions, masked or not.
    """
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
        function()
    return int(counter.get_total_flops())


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


_ATTENTION: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops  # noqa: SLF001
}
"""Kernels of attention that torch does not count by itself."""


def _saved(model: nn.Module) -> dict[int, int]:
    """Return the bytes of each saved tensor of a model by its id."""
    return {
        id(value): _bytes(value) for value in model.state_dict(keep_vars=True).values() if isinstance(value, Tensor)
    }


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()
