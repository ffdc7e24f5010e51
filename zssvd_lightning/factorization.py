"""From spectra and a selection to truncated weights, and from those to low-rank modules, swapped in once at the end.

Shapes: up (m, k), down (k, n), W_k (m, n).
"""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from zssvd_lightning.modules import low_rank_like
from zssvd_lightning.targets import Target, replace_module

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


def install(model: nn.Module, targets: Mapping[str, Target], factors: Mapping[str, Factors]) -> dict[str, nn.Module]:
    """Replaces the targets that have factors, wherever they stand in `model`; returns the new layers by name.

    Biases, `requires_grad` flags, training mode and forward and backward hooks carry over; layers without factors stay
    as they are.
    Nothing is replaced before all the new layers are there.
    """
    installed: dict[str, nn.Module] = {}
    for name, (up, down) in factors.items():
        old = targets[name].module
        new = low_rank_like(old, down.shape[0])
        new.fill(up, down, old.bias)
        new.__dict__.update(
            {kind: old.__dict__[kind] for kind in HOOKS}
        )  # the same, so that their handles go on working
        installed[name] = new
    for name, layer in installed.items():
        replace_module(model, targets[name].module, layer)
    return installed
