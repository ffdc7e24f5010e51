"""Pivoting Factorization with columns: k columns of a rank-k matrix, and coefficients for the other columns.

Shapes: W (m, n) of rank k, up (m, k), down (k, n), pivot columns Q (m, k), coefficients C (k, n - k). Imports only
torch and transformers, so that a saved folder can contain a copy of this file.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from zssvd_lightning.layers.gradients import is_eager, narrowed, permuted
from zssvd_lightning.layers.pivoted import PivotForm, is_plain


class ColumnPivotedLinear(PivotForm):
    """Linear layer of k pivot columns: `y = Q (x_1 + C x_2) + b` with `[x_1; x_2] = x[order]`. See `PivotForm`.

    It puts the inputs in order where `PivotedLinear` does so with the outputs.

    Attributes:
        columns: `nn.Linear` with weight Q (m, k) and the bias of the replaced layer.
        mixing: `nn.Linear` with weight C (k, n - k), without bias. None if all columns are pivots.
        order: int32 (n,), index of the input at each position of `[x_1; x_2]`. None unless `ordered`.
    """

    kind = "pivoted_columns"
    thin: ClassVar[Mapping[str, str]] = {"down": "mixing", "up": "columns"}
    pivot_part = "columns"
    rank_axis = 1

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        ordered: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, rank)
        left = in_features - rank
        self.columns = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)
        self.mixing = nn.Linear(left, rank, bias=False, device=device, dtype=dtype) if left else None
        order = torch.arange(in_features, dtype=torch.int32, device=device)
        self.register_buffer("order", order if ordered else None)

    @classmethod
    def basis(cls, up: Tensor, down: Tensor) -> Tensor:
        """Return `down^T`, whose rows have the dependencies of the columns of W."""
        return down.T

    def _overwrite(self, up: Tensor, down: Tensor, bias: Tensor | None, order: Tensor, C: Tensor) -> None:
        wide = torch.promote_types(up.dtype, torch.float32)
        self.columns.weight.copy_(up.to(wide) @ down[:, order[: self.rank]].to(wide))
        if self.mixing is not None:
            self.mixing.weight.copy_(C.T)
        if self.order is not None:
            self.order.copy_(order)
        if bias is not None:
            self.columns.bias.copy_(bias)

    @property
    def rank(self) -> int:
        """Rank k, the number of pivot columns."""
        return self.columns.in_features

    @property
    def bias(self) -> Tensor | None:
        """Bias (m,) of `columns`, or None."""
        return self.columns.bias

    @property
    def weight(self) -> Tensor:
        """See `CompressedLinear`. Excludes an adapter."""
        Q = self.columns.weight
        columns = Q if self.mixing is None else torch.cat([Q, Q @ self.mixing.weight], 1)
        return columns if self.order is None else columns.index_select(1, self.order.argsort())

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., n) to (..., m)."""
        if not torch.jit.is_scripting() and self._has_plain_mixing():  # type: ignore[attr-defined]
            return self._added_in_product(x)
        order = self.order  # as a local variable, torch.jit.script knows its type
        if order is not None:
            x = permuted(x, order)
        if self.mixing is not None:
            first, others = torch.split(x, [self.mixing.out_features, self.mixing.in_features], -1)
            x = first + self.mixing(others)
        y: Tensor = self.columns(x)
        return y

    @torch.jit.unused
    def _has_plain_mixing(self) -> bool:
        return not torch.compiler.is_compiling() and self.mixing is not None and is_plain(self.mixing)

    @torch.jit.unused
    def _added_in_product(self, x: Tensor) -> Tensor:
        """Add `x_1` within the product `C x_2`, instead of after it."""
        rows = x.reshape(-1, x.shape[-1])
        if self.order is not None:
            rows = permuted(rows, self.order)
        C = self.mixing.weight  # type: ignore[union-attr]
        if torch.is_grad_enabled() and is_eager(rows):
            z = narrowed(rows, C)  # with a gradient that is written once
        else:
            z = torch.addmm(rows[:, : self.rank], rows[:, self.rank :], C.t())
        y: Tensor = self.columns(z)
        return y.view(*x.shape[:-1], self.out_features)
