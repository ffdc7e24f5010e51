"""Linear layer of two factors."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zssvd_lightning.layers.base import FactoredLinear


class LowRankLinear(FactoredLinear):
    """Linear layer of rank k, as two thin layers: `y = up(down(x))`.

    Args:
        in_features: n, size of the input.
        out_features: m, size of the output.
        rank: k. It saves parameters if `k (m + n) < m n`.
        bias: True if `up` adds a bias (m,).

    Attributes:
        down: `nn.Linear` with weight (k, n), without bias.
        up: `nn.Linear` with weight (m, k) and the bias of the replaced layer.

    Example:
        >>> LowRankLinear(in_features=64, out_features=48, rank=8)(torch.randn(3, 64)).shape
        torch.Size([3, 48])
    """

    kind = "low_rank"
    thin: ClassVar[Mapping[str, str]] = {"down": "down", "up": "up"}

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    def from_factors(cls, up: Tensor, down: Tensor, bias: Tensor | None) -> "LowRankLinear":
        """Create a layer with weight `up @ down`, from up (m, k), down (k, n) and an optional bias (m,)."""
        (m, k), n = up.shape, down.shape[1]
        layer = cls(n, m, k, bias is not None, "meta", up.dtype).to_empty(device=up.device)
        layer.fill(up, down, bias)
        return layer

    @classmethod
    def found_in(cls, weights: Mapping[str, Any], name: str) -> dict[str, Any] | None:
        """See `CompressedLinear`."""
        parts = (f"{name}.{part}" for part in ("up", "down"))  # peft renames adapted ones to base_layer
        up, down = (weights.get(f"{p}.weight", weights.get(f"{p}.base_layer.weight")) for p in parts)
        return None if up is None or down is None else {"rank": len(down)}

    @torch.no_grad()
    def fill(self, up: Tensor, down: Tensor, bias: Tensor | None) -> None:
        """Overwrite the values with up (m, k), down (k, n) and, unless None, bias (m,)."""
        self.up.weight.copy_(up)
        self.down.weight.copy_(down)
        if bias is not None:
            self.up.bias.copy_(bias)

    @property
    def rank(self) -> int:
        """Rank k, the size of the space between the two factors."""
        return self.down.out_features

    @property
    def spec(self) -> dict[str, Any]:
        """See `CompressedLinear`."""
        return {"kind": self.kind, "rank": self.rank}

    @property
    def weight(self) -> Tensor:
        """See `CompressedLinear`. Excludes an adapter."""
        return self.up.weight @ self.down.weight

    @property
    def bias(self) -> Tensor | None:
        """Bias (m,) of `up`, or None."""
        return self.up.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., n) to (..., m)."""
        output: Tensor = self.up(self.down(x))
        return output
