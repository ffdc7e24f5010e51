"""Storage forms of a matrix, and the cost of each rank in every unit that a budget can have.

Shapes: a matrix is (m, n), of rank k.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, Optional

if TYPE_CHECKING:  # layers load transformers, and costs do not
    from torch import Tensor

    from zssvd_lightning.layers.base import CompressedLinear, Dense
    from zssvd_lightning.layers.int8 import Int8LowRankLinear
    from zssvd_lightning.layers.low_rank import LowRankLinear


class Kept(NamedTuple):
    """Numbers that a matrix is stored in."""

    wide: int = 0
    """Numbers in 16 bits."""
    codes: int = 0
    """Numbers in 8 bits."""
    beside: int = 0
    """Bytes of what codes and rows need beside them: scales in bfloat16, an order in int32."""
    products: int = 0
    """Multiplications with an addition, a token."""


UNITS: dict[str, Callable[[Kept], int]] = {
    "parameters": lambda kept: kept.wide - -kept.codes // 2,
    "bytes": lambda kept: 2 * kept.wide + kept.codes + kept.beside,
    "flops": lambda kept: 2 * kept.products,
}
"""By name. `parameters`: numbers, two in 8 bits being one. `bytes`: of the weights as they are saved, what is not in 8
bits being in 16. `flops`: floating-point operations of the forward, a token."""


def dense_weight(m: int, n: int) -> Kept:
    """The weight as it was, in 16 bits."""
    return Kept(wide=m * n, products=m * n)


def dense_codes(m: int, n: int) -> Kept:
    """The weight in 8 bits, with a scale for each row: `Int8Linear`."""
    return Kept(codes=m * n, beside=2 * m, products=m * n)


def factors(m: int, n: int, k: int) -> Kept:
    """Up (m, k) and down (k, n): `LowRankLinear`."""
    return Kept(wide=k * (m + n), products=k * (m + n))


def pivoted(m: int, n: int, k: int) -> Kept:
    """Rows of the product (k, n), how they make the others (m - k, k), and the order of all: `PivotedLinear`."""
    return Kept(wide=k * (m + n - k), beside=4 * m, products=k * (m + n - k))


def remapped(m: int, n: int, k: int) -> Kept:
    """Factors with the last rows or columns of the larger in 16 bits, the rest in 8: `Int8LowRankLinear`.

    Where other rows and columns than the last stay in 16 bits, the orders of both come to it.
    """
    return Kept(wide=k * abs(m - n), codes=2 * k * min(m, n), beside=2 * k, products=k * (m + n))


def factor_codes(m: int, n: int, k: int) -> Kept:
    """Factors all in 8 bits, with a scale for each component: `Int8LowRankLinear`."""
    return Kept(codes=k * (m + n), beside=2 * k, products=k * (m + n))


def round_all(layer: "LowRankLinear") -> "Int8LowRankLinear":
    """Return a layer with both factors in 8 bits, as `factor_codes` counts it."""
    return _rounded(layer, layer.out_features, layer.in_features)


def round_all_but_last(layer: "LowRankLinear") -> "Int8LowRankLinear":
    """Return a layer with the last rows or columns of the larger factor in 16 bits, as `remapped` counts it."""
    square = min(layer.out_features, layer.in_features)
    return _rounded(layer, square, square)


def round_except(layer: "LowRankLinear", rows: "Tensor", columns: "Tensor") -> "Int8LowRankLinear":
    """Return a layer in 8 bits, except the marked rows of `up` (m,) and columns of `down` (n,)."""
    from zssvd_lightning.layers.int8 import Int8LowRankLinear

    return Int8LowRankLinear.of(layer, rows, columns)


def round_dense(layer: "Dense") -> "CompressedLinear":
    """Return a dense layer in 8 bits, as `dense_codes` counts it."""
    from zssvd_lightning.layers.int8 import Int8Linear

    return Int8Linear.of(layer)


@dataclass(frozen=True)
class Storage:
    """One way to keep matrices. Costs are in a unit, by its name in `UNITS`."""

    low_rank: Callable[[int, int, int], Kept]
    """Numbers that store (m, n) at rank k."""
    dense: Callable[[int, int], Kept] = dense_weight
    """Numbers that store a dense (m, n)."""
    in_8_bits: Optional["Storage"] = None
    """The 8-bit alternative, if the selection rule chooses it for each matrix; None otherwise."""
    layer: str = "low_rank"
    """Kind of the layers that hold factors and are trained: a subclass of `LowRankLinear` or `PivotedLinear`."""
    rounded: Callable[["LowRankLinear"], "CompressedLinear"] | None = None
    """Function that returns a low-rank layer in 8 bits, at the end of training. None if it keeps its type."""
    rounded_dense: Callable[["Dense"], "CompressedLinear"] | None = None
    """Function that returns a dense layer in 8 bits, at the end of training. None if it keeps its type."""
    rounded_except: Callable[["LowRankLinear", "Tensor", "Tensor"], "CompressedLinear"] | None = None
    """Function that returns a low-rank layer in 8 bits, except the rows of `up` marked in a boolean (m,) and the
    columns of `down` marked in a boolean (n,). `rows_in_16_bits: loss_aware` needs it, and marks as many entries as
    `remap` leaves in 16 bits. None if the choice is fixed."""
    classes: tuple[type["CompressedLinear"], ...] = ()
    """Layer classes of this storage that are not part of the package; registration makes them loadable."""

    @property
    def rounds(self) -> bool:
        """True if layers may end in 8 bits."""
        return self.in_8_bits is not None or self.rounded is not None or self.rounded_dense is not None

    @property
    def weighs_rows(self) -> bool:
        """True if the rows and columns that stay in 16 bits can be chosen."""
        return self.rounded_except is not None

    def rounds_at(self, rank: int | None) -> bool:
        """Return True if a layer of this rank, None for dense, always ends in 8 bits."""
        return (self.rounded_dense if rank is None else self.rounded) is not None

    def low_rank_cost(self, m: int, n: int, rank: int, unit: str = "parameters") -> int:
        """Cost of (m, n) in its low-rank form."""
        return UNITS[unit](self.low_rank(m, n, rank))

    def dense_cost(self, m: int, n: int, unit: str = "parameters") -> int:
        """Cost of (m, n) where it stays dense."""
        return UNITS[unit](self.dense(m, n))

    def costs(self, m: int, n: int, unit: str = "parameters") -> tuple[int, ...]:
        """Cost of (m, n) by how many components are left, from 0 to all; above the highest rank it stays dense."""
        return _costs(self, m, n, unit)

    def highest_rank(self, m: int, n: int, unit: str = "parameters") -> int:
        """The largest rank at which (m, n) costs less than it does dense; 0 where there is none.

        Never the full one: then nothing is dropped, and the matrix stays dense.
        """
        ranks, dense = range(min(m, n)), self.dense_cost(m, n, unit)
        return max(0, bisect_left(ranks, dense, key=lambda k: self.low_rank_cost(m, n, k, unit)) - 1)


@lru_cache(maxsize=1024)
def _costs(storage: Storage, m: int, n: int, unit: str) -> tuple[int, ...]:
    highest = storage.highest_rank(m, n, unit)
    low_rank = [storage.low_rank_cost(m, n, k, unit) for k in range(highest + 1)]
    return (*low_rank, *[storage.dense_cost(m, n, unit)] * (min(m, n) - highest))


def break_even_rank(m: int, n: int) -> int:
    """The largest rank whose factors have fewer than `m n` numbers: `r* = (m n - 1) // (m + n)`."""
    return (m * n - 1) // (m + n)


def _rounded(layer: "LowRankLinear", rows: int, columns: int) -> "Int8LowRankLinear":
    """Round the first rows of `up` and the first columns of `down`."""
    import torch

    outputs, inputs = torch.arange(layer.out_features), torch.arange(layer.in_features)
    return round_except(layer, outputs >= rows, inputs >= columns)


HQ = Storage(factor_codes, dense_codes, rounded=round_all, rounded_dense=round_dense)


STORAGES: dict[str, Storage] = {
    "factors": Storage(factors),
    "pivoted": Storage(pivoted, layer="pivoted"),
    "remap": Storage(remapped, rounded=round_all_but_last, rounded_except=round_except),
    "hq": HQ,
    "mixed": Storage(factors, in_8_bits=HQ),
}
"""By name, including those registered through `selection.storages`. `factors`: up and down, in the model's type.
`pivoted`: the same function in `k (m + n - k)` numbers, so that every rank but the full one is less than dense (PIFA,
arXiv 2501.19090). `remap`: in 8 bits, but for as many rows or columns of the larger factor as it has more than the
smaller (Dobi-SVD, arXiv 2502.02723). `hq`: everything in 8 bits, which takes half of the budget alone (half-quantized,
arXiv 2602.02848). `mixed`: each matrix as with `factors` or as with `hq`."""


ROWS_IN_16_BITS = ("last", "loss_aware")
"""Ways in which `remap` chooses the rows that stay in 16 bits."""
