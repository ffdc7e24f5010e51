"""The layer a factorised linear becomes, and the way back to a dense one.

Shapes: W (m, n), up (m, k), down (k, n).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

LOADING_NOTE = "low-rank: inherit zssvd_lightning.LowRankCheckpointMixin, or give the Trainer a ZSSVDCallback, to load"
"""Stands in for a parameter name in checkpoints, so that a load that knows nothing of low-rank layers says it."""

Dense = nn.Linear | Conv1D
"""The layers that can become low-rank."""


class LowRankLinear(nn.Module):
    """`y = up(down(x))`: a linear layer of rank k, as two thin ones.

    Args:
        in_features: n, size of the input.
        out_features: m, size of the output.
        rank: k, with `k (m + n) < m n` wherever it pays.
        bias: whether `up` adds a bias (m,).

    Attributes:
        down: `nn.Linear`, weight (k, n), no bias.
        up: `nn.Linear`, weight (m, k), and the bias of the layer it replaces.
        transposed: whether the layer it replaces stored its weight as (n, m), the way `Conv1D` of transformers does.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)
        self.transposed = False
        self.register_load_state_dict_pre_hook(_drop_note)  # type: ignore[no-untyped-call]

    @classmethod
    def from_factors(cls, up: Tensor, down: Tensor, bias: Tensor | None) -> "LowRankLinear":
        """A layer of weight `up @ down`, from up (m, k), down (k, n) and bias (m,) or None."""
        (m, k), n = up.shape, down.shape[1]
        layer = cls(n, m, k, bias is not None, "meta", up.dtype).to_empty(device=up.device)
        layer.fill(up, down, bias)
        return layer

    @torch.no_grad()
    def fill(self, up: Tensor, down: Tensor, bias: Tensor | None) -> None:
        """Overwrites the values, by up (m, k), down (k, n) and bias (m,) where there is one."""
        self.up.weight.copy_(up)
        self.down.weight.copy_(down)
        if bias is not None:
            self.up.bias.copy_(bias)

    @property
    def in_features(self) -> int:
        """n, size of the input."""
        return self.down.in_features

    @property
    def out_features(self) -> int:
        """m, size of the output."""
        return self.up.out_features

    @property
    def rank(self) -> int:
        """k, size of the space between the two factors."""
        return self.down.out_features

    @property
    def weight(self) -> Tensor:
        """The dense weight (m, n) the factors stand for, multiplied out at each access: for code that asks for it."""
        return self.up.weight @ self.down.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias (m,), which `up` holds."""
        return self.up.bias

    def forward(self, x: Tensor) -> Tensor:
        """Maps x (..., n) to (..., m)."""
        output: Tensor = self.up(self.down(x))
        return output

    def extra_repr(self) -> str:
        """Shape and rank, as `print(model)` shows them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def shape_of(layer: Dense | LowRankLinear) -> tuple[int, int]:
    """(m, n): outputs, inputs."""
    if isinstance(layer, Conv1D):
        n, m = layer.weight.shape
        return m, n
    return layer.out_features, layer.in_features


def low_rank_like(layer: Dense | LowRankLinear, rank: int) -> LowRankLinear:
    """A layer of `rank` on the meta device, for the place of `layer`: its type, `requires_grad` and mode."""
    m, n = shape_of(layer)
    new = LowRankLinear(n, m, rank, layer.bias is not None, "meta", _parameter(layer).dtype)
    new.transposed = layer.transposed if isinstance(layer, LowRankLinear) else isinstance(layer, Conv1D)
    _take_after(new, layer)
    return new


def dense_like(layer: LowRankLinear) -> Dense:
    """The kind of dense layer that `layer` replaced, on the meta device, for its place."""
    m, n = shape_of(layer)
    with torch.device("meta"):
        new: Dense = nn.Linear(n, m, layer.bias is not None)
        if layer.transposed:
            new = Conv1D(m, n)  # type: ignore[no-untyped-call]
    new.to(_parameter(layer).dtype)
    _take_after(new, layer)
    return new


def _take_after(new: Dense | LowRankLinear, old: Dense | LowRankLinear) -> None:
    new.train(old.training)
    for name, parameter in new.named_parameters():
        like = old.bias if name.endswith("bias") and old.bias is not None else _parameter(old)
        parameter.requires_grad_(like.requires_grad)


def _parameter(layer: Dense | LowRankLinear) -> Tensor:
    return layer.down.weight if isinstance(layer, LowRankLinear) else layer.weight


def _drop_note(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    state_dict.pop(f"{prefix}{LOADING_NOTE}", None)  # type: ignore[attr-defined]
