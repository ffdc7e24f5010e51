"""From factors to truncated weights, and to the low-rank layers that are swapped in once, at the end.

Shapes: up (m, k), down (k, n), W_k (m, n).
"""

from typing import NamedTuple

from torch import Tensor

from zssvd_lightning.modules import Dense, LowRankLinear, low_rank_like

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
"""Where `nn.Module` keeps them."""


class Factors(NamedTuple):
    """`W_k = up @ down`."""

    up: Tensor
    down: Tensor

    def to(self, like: Tensor) -> "Factors":
        """The same on the device and in the type of `like`."""
        return Factors(self.up.to(like), self.down.to(like))


def truncated_weight(factors: Factors) -> Tensor:
    """`W_k = (U_k sqrt(S_k)) (sqrt(S_k) V_k^T L^-1)` (m, n)."""
    return factors.up @ factors.down


def low_rank_layer(old: Dense, factors: Factors, bias: Tensor | None) -> LowRankLinear:
    """The layer that takes the place of `old`.

    Bias, `requires_grad` flags, training mode and forward and backward hooks carry over.
    """
    new = low_rank_like(old, len(factors.down))
    new.to_empty(device=factors.up.device)
    new.fill(*factors, bias)
    new.__dict__.update({kind: old.__dict__[kind] for kind in HOOKS})  # the same, so that their handles go on working
    return new
