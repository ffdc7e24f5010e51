"""Pivoting Factorization (PIFA, arXiv 2501.19090): k rows of a rank-k matrix, and coefficients for the other rows.

Shapes: W (m, n) of rank k, up (m, k), down (k, n), pivot rows P (k, n), coefficients C (m - k, k). Imports only torch
and transformers, so that a saved folder can contain a copy of this file.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from zssvd_lightning.layers.base import FactoredLinear
from zssvd_lightning.layers.gradients import is_eager, permuted, widened
from zssvd_lightning.layers.pivots import choose_pivots, coefficients

FEW = 2**16
"""Number of outputs up to which it takes less time on a CPU to concatenate them than to write them into one tensor."""


class PivotForm(FactoredLinear):
    """Base class of layers of rank k in `k (m + n - k)` numbers: k rows or columns of W, and coefficients of the rest.

    Two factors of the same W take `k (m + n)` numbers, k^2 of which encode a choice of basis that has no effect on W.

    Args:
        in_features: n, size of the input.
        out_features: m, size of the output.
        rank: k, at most m and n.
        bias: True to add a bias (m,).
        ordered: False if the pivots are the first outputs (or inputs) of the layer, so that no order is stored.

    Attributes:
        order: int32 permutation of the outputs (or inputs). None unless `ordered`.
    """

    permutations = ("order",)
    pivot_part: ClassVar[str]
    """Name of the thin layer that holds the pivots."""
    rank_axis: ClassVar[int]
    """Axis of the weight of that layer that has size k."""
    order: Tensor | None

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
        super().__init__(in_features, out_features)

    @classmethod
    def from_factors(cls, up: Tensor, down: Tensor, bias: Tensor | None, order: Tensor | None = None) -> Self:
        """Create a layer with weight `up @ down`, from up (m, k), down (k, n) and an optional bias (m,).

        With an `order`, the layer is not `ordered`; see `fill`.
        """
        (m, k), n = up.shape, down.shape[1]
        layer = cls(n, m, k, bias is not None, order is None, "meta", up.dtype).to_empty(device=up.device)
        layer.fill(up, down, bias, order)
        return layer

    @classmethod
    def found_in(cls, weights: Mapping[str, Any], name: str) -> dict[str, Any] | None:
        """See `CompressedLinear`."""
        part = f"{name}.{cls.pivot_part}"  # peft renames its weight to base_layer
        pivots = weights.get(f"{part}.weight", weights.get(f"{part}.base_layer.weight"))
        if pivots is None:
            return None
        return {"rank": pivots.shape[cls.rank_axis]} | ({} if f"{name}.order" in weights else {"ordered": False})

    @classmethod
    def basis(cls, up: Tensor, down: Tensor) -> Tensor:
        """Return the factor, transposed for columns, among whose rows pivots are chosen: (m, k) or (n, k)."""
        raise NotImplementedError

    @torch.no_grad()
    def fill(
        self, up: Tensor, down: Tensor, bias: Tensor | None, order: Tensor | None = None, C: Tensor | None = None
    ) -> None:
        """Overwrite the values, so that the weight is `up @ down`.

        Without `ordered`, the weight is `(up @ down)[order]` and the bias `bias[order]` for pivot rows; for pivot
        columns, the weight is `(up @ down)[:, order]`.

        Args:
            up: factor (m, k).
            down: factor (k, n).
            bias: bias (m,), or None.
            order: indices of outputs (m,), or of inputs (n,) for columns, the k pivots first. Chosen by `choose_pivots`
                if None.
            C: coefficients of the others in float64, as `coefficients` returns them for `order`. Computed if None.

        Raises:
            ValueError: `order` is None although the layer is not `ordered`, is no permutation, or starts with pivots
                that do not span the others.
        """
        basis = self.basis(up, down)
        if order is None:
            if self.order is None:
                raise ValueError(f"{type(self).__name__}({self.extra_repr()}) has no order of its own; pass one")
            order, C = choose_pivots(basis)
        elif not torch.equal(order.sort().values, torch.arange(len(basis), device=order.device)):
            raise ValueError(f"order {tuple(order.shape)} is no permutation of 0 to {len(basis) - 1}")
        C = coefficients(basis, order) if C is None else C
        self._overwrite(up, down, bias, order.to(up.device), C)

    def _overwrite(self, up: Tensor, down: Tensor, bias: Tensor | None, order: Tensor, C: Tensor) -> None:
        raise NotImplementedError

    @property
    def spec(self) -> dict[str, Any]:
        """See `CompressedLinear`."""
        return {"kind": self.kind, "rank": self.rank} | ({} if self.order is not None else {"ordered": False})

    @property
    def rank(self) -> int:
        """Rank k, the number of pivots."""
        raise NotImplementedError


class PivotedLinear(PivotForm):
    """Linear layer of k pivot rows: `y = [z; C z][order] + b` with `z = P x`. See `PivotForm`.

    Attributes:
        pivots: `nn.Linear` with weight P (k, n), without bias.
        others: `nn.Linear` with weight C (m - k, k), without bias. None if all rows are pivots.
        order: int32 (m,), position of each output in `[z; C z]`. None unless `ordered`: the outputs are `[z; C z]`.
    """

    kind = "pivoted"
    thin: ClassVar[Mapping[str, str]] = {"down": "pivots", "up": "others"}
    pivot_part = "pivots"
    rank_axis = 0

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
        left = out_features - rank
        self.pivots = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.others = nn.Linear(rank, left, bias=False, device=device, dtype=dtype) if left else None
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        order = torch.arange(out_features, dtype=torch.int32, device=device)
        self.register_buffer("order", order if ordered else None)

    @classmethod
    def basis(cls, up: Tensor, down: Tensor) -> Tensor:
        """Return `up`, whose rows have the dependencies of the rows of W."""
        return up

    def _overwrite(self, up: Tensor, down: Tensor, bias: Tensor | None, order: Tensor, C: Tensor) -> None:
        wide = torch.promote_types(up.dtype, torch.float32)
        self.pivots.weight.copy_(up[order[: self.rank]].to(wide) @ down.to(wide))
        if self.others is not None:
            self.others.weight.copy_(C)
        if self.order is not None:
            self.order.copy_(order.argsort())
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias if self.order is not None else bias[order])

    @property
    def rank(self) -> int:
        """Rank k, the number of pivot rows."""
        return self.pivots.out_features

    @property
    def weight(self) -> Tensor:
        """See `CompressedLinear`. Excludes an adapter."""
        P = self.pivots.weight
        rows = P if self.others is None else torch.cat([P, self.others.weight @ P])
        return rows if self.order is None else rows.index_select(0, self.order)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., n) to (..., m)."""
        if not torch.jit.is_scripting() and self._can_write_once(x):  # type: ignore[attr-defined]
            return self._written_once(x)
        order, bias = self.order, self.bias  # as local variables, torch.jit.script knows their types
        z = self.pivots(x)
        y: Tensor = z if self.others is None else torch.cat([z, self.others(z)], -1)
        if order is not None:
            y = permuted(y, order)
        return y if bias is None else y + bias.to(y.dtype)

    @torch.jit.unused
    def _can_write_once(self, x: Tensor) -> bool:
        if not is_eager(x) or (x.device.type == "cpu" and x.numel() * self.out_features <= FEW * self.in_features):
            return False
        return all(map(is_plain, self.children()))

    @torch.jit.unused
    def _written_once(self, x: Tensor) -> Tensor:
        """Write both products into one output, instead of concatenating them."""
        rows = x.reshape(-1, x.shape[-1])
        if self.others is None:
            y: Tensor = self.pivots(rows)
        elif torch.is_grad_enabled():
            y = widened(self.pivots(rows), self.others.weight)
        else:
            y = rows.new_empty(len(rows), self.out_features)
            z = torch.mm(rows, self.pivots.weight.t(), out=y[:, : self.rank])
            torch.mm(z, self.others.weight.t(), out=y[:, self.rank :])
        if self.order is not None:
            y = permuted(y, self.order)
        if self.bias is not None:
            y += self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)


def is_plain(part: nn.Module) -> bool:
    """Return True if a thin layer does nothing but multiply by a parameter: no adapter, hook or sharded weight."""
    own = part.__dict__
    return (
        type(part) is nn.Linear
        and type(own["_parameters"].get("weight")) is nn.Parameter
        and "forward" not in own
        and not (own["_forward_hooks"] or own["_forward_pre_hooks"])
        and not (own["_backward_hooks"] or own["_backward_pre_hooks"])
        and not torch_module._has_any_global_hook()  # type: ignore[no-untyped-call]  # noqa: SLF001
    )
