"""Layer of a cache that keeps keys and values in low-rank bases."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from zssvd_lightning.errors import UnsupportedCacheError
from zssvd_lightning.kv_cache.bases import Bases


class LayerBases(NamedTuple):
    """Bases of the keys and of the values of one layer."""

    keys: Bases
    values: Bases


class LowRankLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Cache of one layer: `keys` (B, T, R) and `values` (B, T, R') are numbers in the bases, R and R' sums of ranks.

    The tokens of a call are read as they are, and earlier ones as they are decoded.
    """

    def __init__(self, number: int, bases: LayerBases) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number = number
        self.bases = bases

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take type and device from the first keys and values, and check that the bases are of their shape."""
        for name, states, bases in zip(("keys", "values"), (key_states, value_states), self.bases, strict=True):
            found = (states.shape[1], states.shape[3])
            if found != bases.shape:
                raise UnsupportedCacheError(
                    f"layer {self.number} caches {name} of (heads, width) {found}, but the bases are for "
                    f"{bases.shape}; use a cache that was calibrated on this model"
                )
        super().lazy_initialization(key_states, value_states)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Cache keys (B, H, T, d) and values, and return those of all tokens at full width."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, keys = _extended(self.keys, key_states, self.bases.keys)
        self.values, values = _extended(self.values, value_states, self.bases.values)
        return keys, values


def _extended(kept: Tensor | None, states: Tensor, bases: Bases) -> tuple[Tensor, Tensor]:
    """Return the numbers kept (B, T, R) with those of new vectors (B, H, t, d), and the vectors of all tokens."""
    own = bases.cast(states.device, states.dtype)
    encoded = own.encode(states)
    if kept is None or kept.numel() == 0:
        return encoded, states
    return torch.cat([kept, encoded], -2), torch.cat([own.decode(kept), states], -2)
