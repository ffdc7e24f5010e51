"""How much the keys and values of each token count: by the attention that they receive."""

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 256
"""Queries whose attention is held at once."""

LEAST = 1e-6
"""Least weight of a token, so that heads whose attention is always on one token have keys that count."""


class TokenWeights(NamedTuple):
    """Weights of each key and value of B sequences, H cached heads and T tokens."""

    keys: Tensor
    """Sums of `p (1 - p)` (B, H, T), where p is the attention of a query: what p changes by when a logit does."""
    values: Tensor
    """Sums of `p` (B, H, T)."""


@torch.no_grad()
def token_weights(queries: Tensor, keys: Tensor, scaling: float, counts: Tensor) -> TokenWeights:
    """Return the weights of keys and values, from causal attention by the softmax of the scaled products.

    What a model adds to these products, such as a bias by distance, is not known here and left out.

    Args:
        queries: queries (B, G H, T, d), where those of a cached head follow each other.
        keys: keys (B, H, T, d).
        scaling: factor of the products.
        counts: positions (B, T) that are not padding.
    """
    B, H, T, d = keys.shape
    position = torch.arange(T, device=keys.device)
    found = TokenWeights(*(torch.zeros(B, H, T, device=keys.device) for _ in TokenWeights._fields))
    for row in range(B):
        K, real = keys[row].float(), counts[row]
        for begin in range(0, T, CHUNK):
            Q = queries[row, :, begin : begin + CHUNK].float().view(H, -1, min(CHUNK, T - begin), d)
            asked = position[begin : begin + CHUNK, None]
            logits = (scaling * Q @ K[:, None].mT).masked_fill(~real | (position > asked), -torch.inf)
            p = logits.softmax(-1)[:, :, real[begin : begin + CHUNK]]  # (H, G, queries, T)
            found.keys[row] += (p * (1 - p)).sum((1, 2))
            found.values[row] += p.sum((1, 2))
    return TokenWeights(*(weights.clamp_min(LEAST) for weights in found))
