"""Pivoting Factorization (PIFA, arXiv 2501.19090): k rows of a rank-k matrix, and coefficients for the other rows.

Shapes: W (m, n) of rank k, up (m, k), down (k, n), pivot rows P (k, n), coefficients C (m - k, k). Imports only torch
and transformers, so that a saved folder can contain a copy of this file. Making a layer from factors also needs scipy.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zssvd_lightning.layers.base import FactoredLinear


class PivotedLinear(FactoredLinear):
    """Linear layer of rank k in `k (m + n - k)` numbers: `y = [z; C z][order] + b` with `z = P x`.

    Two factors of the same W take `k (m + n)` numbers, k^2 of which encode a choice of basis that has no effect on W.

    Args:
        in_features: n, size of the input.
        out_features: m, size of the output.
        rank: k, at most m.
        bias: True to add a bias (m,).

    Attributes:
        pivots: `nn.Linear` with weight P (k, n), without bias.
        others: `nn.Linear` with weight C (m - k, k), without bias. None if all rows are pivots.
        order: int32 (m,), position of each output in `[z; C z]`.
    """

    kind = "pivoted"
    permutations = ("order",)
    thin: ClassVar[Mapping[str, str]] = {"down": "pivots", "up": "others"}
    order: Tensor

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
        left = out_features - rank
        self.pivots = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.others = nn.Linear(rank, left, bias=False, device=device, dtype=dtype) if left else None
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.register_buffer("order", torch.arange(out_features, dtype=torch.int32, device=device))

    @classmethod
    def from_factors(cls, up: Tensor, down: Tensor, bias: Tensor | None) -> "PivotedLinear":
        """Create a layer with weight `up @ down`, from up (m, k), down (k, n) and an optional bias (m,)."""
        (m, k), n = up.shape, down.shape[1]
        layer = cls(n, m, k, bias is not None, "meta", up.dtype).to_empty(device=up.device)
        layer.fill(up, down, bias)
        return layer

    @classmethod
    def found_in(cls, weights: Mapping[str, Any], name: str) -> dict[str, Any] | None:
        """See `CompressedLinear`."""
        part = f"{name}.pivots"  # peft renames its weight to base_layer
        rows = weights.get(f"{part}.weight", weights.get(f"{part}.base_layer.weight"))
        return None if rows is None or f"{name}.order" not in weights else {"rank": len(rows)}

    @torch.no_grad()
    def fill(self, up: Tensor, down: Tensor, bias: Tensor | None, rows: Tensor | None = None) -> None:
        """Overwrite the values.

        Args:
            up: factor (m, k).
            down: factor (k, n).
            bias: bias (m,), or None.
            rows: result of `pivots_first` (m,). Computed from `up` if None.
        """
        rows = (pivots_first(up) if rows is None else rows).to(up.device)
        wide = torch.promote_types(up.dtype, torch.float32)
        self.pivots.weight.copy_(up[rows[: self.rank]].to(wide) @ down.to(wide))
        if self.others is not None:
            self.others.weight.copy_(coefficients(up, rows))
        self.order.copy_(rows.argsort())
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    @property
    def rank(self) -> int:
        """Rank k, the number of pivot rows."""
        return self.pivots.out_features

    @property
    def spec(self) -> dict[str, Any]:
        """See `CompressedLinear`."""
        return {"kind": self.kind, "rank": self.rank}

    @property
    def weight(self) -> Tensor:
        """See `CompressedLinear`. Excludes an adapter."""
        P = self.pivots.weight
        rows = P if self.others is None else torch.cat([P, self.others.weight @ P])
        return rows.index_select(0, self.order)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., n) to (..., m)."""
        z = self.pivots(x)
        y: Tensor = z if self.others is None else torch.cat([z, self.others(z)], -1)
        y = y.index_select(-1, self.order)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def pivots_first(up: Tensor) -> Tensor:
    """Return an order of the rows of W that starts with k pivots, such that C has small entries.

    The rows of `W = up down` have the same linear dependencies as the rows of `up`. QR of `up^T` with column pivoting
    chooses as the next pivot the row farthest from the span of the earlier ones, as in the PIFA paper.

    Args:
        up: factor (m, k).

    Returns:
        Row indices (m,), int64, on the CPU.

    Raises:
        ImportError: scipy is not installed.
    """
    try:  # in a try, since transformers treats any other import in a copied file as required for loading
        from scipy.linalg import qr  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("pivot rows are chosen by scipy; pip install scipy") from error
    _, rows = qr(up.detach().cpu().double().T.numpy(), mode="r", pivoting=True)
    return torch.from_numpy(rows).long()


def coefficients(up: Tensor, rows: Tensor) -> Tensor:
    """Return the coefficients C (m - k, k) that express the other rows by the pivots: `up_others = C up_pivots`.

    With `up_pivots^T = Q R`, C solves `R C^T = Q^T up_others^T`. If the rank r of `up` is below k, the first r pivots
    span all rows, and the coefficients of the remaining pivots are 0.

    Args:
        up: factor (m, k).
        rows: result of `pivots_first` (m,).

    Returns:
        C in float64, on the CPU.
    """
    ordered = up.detach().cpu().double()[rows.cpu()]
    k = up.shape[1]
    Q, R = torch.linalg.qr(ordered[:k].T)
    sizes = R.diagonal().abs()  # descending, by the choice of pivots
    r = int((sizes > sizes.max() * len(up) * torch.finfo(R.dtype).eps).sum())
    C = ordered.new_zeros(len(up) - k, k)
    C[:, :r] = torch.linalg.solve_triangular(R[:r, :r], Q[:, :r].T @ ordered[k:].T, upper=True).T
    return C
