"""The layer a factorised linear becomes."""

import torch
from torch import Tensor, nn


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

    @classmethod
    def from_factors(cls, up: Tensor, down: Tensor, bias: Tensor | None) -> "LowRankLinear":
        """A layer of weight `up @ down`, from up (m, k), down (k, n) and bias (m,) or None."""
        (m, k), n = up.shape, down.shape[1]
        layer = cls(n, m, k, bias=bias is not None, device="meta", dtype=up.dtype)
        layer.down.weight = nn.Parameter(down.detach().clone(memory_format=torch.contiguous_format))
        layer.up.weight = nn.Parameter(up.detach().clone(memory_format=torch.contiguous_format))
        if bias is not None:
            layer.up.bias = nn.Parameter(bias.detach().clone())
        return layer

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
