"""Pivoting Factorization (PIFA, arXiv 2501.19090): a matrix of rank k as k of its rows, and how they make the others.

Shapes: W (m, n) of rank k, up (m, k), down (k, n), pivot rows P (k, n), coefficients C (m - k, k). Needs nothing but
torch and transformers, so that a saved folder can carry it; scipy only to make a layer from factors.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zssvd_lightning.layers.base import CompressedLinear


class PivotedLinear(CompressedLinear):
    """`y = [z; C z] in its order + b` with `z = P x`: a linear layer of rank k in `k (m + n - k)` numbers.

    Two factors of the same W have `k (m + n)`, of which k^2 are spent on a choice of basis that changes nothing.

    Args:
        in_features: n, size of the input.
        out_features: m, size of the output.
        rank: k, at most m.
        bias: whether there is a bias (m,).

    Attributes:
        pivots: `nn.Linear`, weight P (k, n), no bias.
        others: `nn.Linear`, weight C (m - k, k), no bias; None where all rows are pivots.
        order: int32 (m,), where each output stands among those of the pivots and then of the others.
    """

    kind = "pivoted"
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
        """A layer of weight `up @ down`, from up (m, k), down (k, n) and bias (m,) or None."""
        (m, k), n = up.shape, down.shape[1]
        layer = cls(n, m, k, bias is not None, "meta", up.dtype).to_empty(device=up.device)
        layer.fill(up, down, bias)
        return layer

    @classmethod
    def found_in(cls, weights: Mapping[str, Any], name: str) -> dict[str, Any] | None:
        """See `CompressedLinear`."""
        if f"{name}.pivots.weight" not in weights or f"{name}.order" not in weights:
            return None
        return {"rank": len(weights[f"{name}.pivots.weight"])}

    @torch.no_grad()
    def fill(self, up: Tensor, down: Tensor, bias: Tensor | None, rows: Tensor | None = None) -> None:
        """Overwrites the values.

        Args:
            up: (m, k).
            down: (k, n).
            bias: (m,), where there is one.
            rows: (m,), a choice of `pivots_first`; made here when None.
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
        """k, how many rows are pivots."""
        return self.pivots.out_features

    @property
    def spec(self) -> dict[str, Any]:
        """See `CompressedLinear`."""
        return {"kind": self.kind, "rank": self.rank}

    @property
    def weight(self) -> Tensor:
        """See `CompressedLinear`."""
        P = self.pivots.weight
        rows = P if self.others is None else torch.cat([P, self.others.weight @ P])
        return rows.index_select(0, self.order)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x (..., n) to (..., m)."""
        z = self.pivots(x)
        y: Tensor = z if self.others is None else torch.cat([z, self.others(z)], -1)
        y = y.index_select(-1, self.order)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def pivots_first(up: Tensor) -> Tensor:
    """The rows of W in an order that begins with k from which the others follow with small coefficients.

    Rows of `W = up down` depend on each other as those of `up` do. QR with column pivoting of `up^T` takes as the next
    pivot the row that is farthest from the span of those before, as the PIFA paper does.

    Args:
        up: (m, k).

    Returns:
        (m,), int64, on the CPU.
    """
    try:  # within a try, since transformers takes any other import of a carried file for one that loading needs
        from scipy.linalg import qr  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("pivot rows are chosen by scipy; pip install scipy") from error
    _, rows = qr(up.detach().cpu().double().T.numpy(), mode="r", pivoting=True)
    return torch.from_numpy(rows).long()


def coefficients(up: Tensor, rows: Tensor) -> Tensor:
    """C (m - k, k), by which the other rows of W are those of the pivots: `up_others = C up_pivots`.

    With `up_pivots^T = Q R`, they solve `R C^T = Q^T up_others^T`. Where the rank of `up` is below k, as many pivots as
    it has make all rows, and the coefficients of the rest are 0.

    Args:
        up: (m, k).
        rows: (m,), from `pivots_first`.

    Returns:
        In float64, on the CPU.
    """
    ordered = up.detach().cpu().double()[rows.cpu()]
    k = up.shape[1]
    Q, R = torch.linalg.qr(ordered[:k].T)
    sizes = R.diagonal().abs()  # falling, by the choice of rows
    r = int((sizes > sizes.max() * len(up) * torch.finfo(R.dtype).eps).sum())
    C = ordered.new_zeros(len(up) - k, k)
    C[:, :r] = torch.linalg.solve_triangular(R[:r, :r], Q[:, :r].T @ ordered[k:].T, upper=True).T
    return C
