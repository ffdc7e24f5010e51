"""Storage forms of a matrix, and the cost of each rank in every unit of a budget.

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


Shape = tuple[int, int]
"""Shape (m, n) of a matrix: outputs, inputs."""


class Kept(NamedTuple):
    """Numbers that store a matrix, and the work of a product with it."""

    wide: int = 0
    """Numbers in 16 bits."""
    codes: int = 0
    """Numbers in 8 bits."""
    beside: int = 0
    """Bytes of scales (bfloat16) and orders (int32)."""
    products: int = 0
    """Multiply-adds per token."""


class Present(NamedTuple):
    """Low-rank form that a matrix has before a further compression."""

    rank: int
    """Rank k."""
    kept: Kept
    """Numbers that store it."""


UNITS: dict[str, Callable[[Kept], int]] = {
    "parameters": lambda kept: kept.wide - -kept.codes // 2,
    "bytes": lambda kept: 2 * kept.wide + kept.codes + kept.beside,
    "flops": lambda kept: 2 * kept.products,
}
"""Units by name. `parameters`: numbers, where two in 8 bits count as one. `bytes`: size of the saved weights, in 8 or
16 bits. `flops`: floating-point operations of the forward pass per token."""


def dense_weight(m: int, n: int) -> Kept:
    """Count the dense weight in 16 bits."""
    return Kept(wide=m * n, products=m * n)


def dense_codes(m: int, n: int) -> Kept:
    """Count the dense weight in 8 bits, with a scale per row: `Int8Linear`."""
    return Kept(codes=m * n, beside=2 * m, products=m * n)


def factors(m: int, n: int, k: int) -> Kept:
    """Count the factors up (m, k) and down (k, n): `LowRankLinear`.

    Example:
        >>> factors(m=6, n=4, k=2).wide
        20
    """
    return Kept(wide=k * (m + n), products=k * (m + n))


def pivoted(m: int, n: int, k: int) -> Kept:
    """Count k pivot rows (k, n), the coefficients of the other rows (m - k, k) and the order: `PivotedLinear`.

    Pivot columns take as many numbers. The order is that of the smaller side; see `form_for`.

    Example:
        >>> pivoted(m=6, n=4, k=2).wide
        16
    """
    return Kept(wide=k * (m + n - k), beside=4 * min(m, n), products=k * (m + n - k))


def remapped(m: int, n: int, k: int) -> Kept:
    """Count factors whose last rows or columns, by which the larger exceeds the smaller, have 16 bits and the rest 8.

    If other rows and columns stay in 16 bits, their orders are stored too, which is not counted: `Int8LowRankLinear`.
    """
    return Kept(wide=k * abs(m - n), codes=2 * k * min(m, n), beside=2 * k, products=k * (m + n))


def factor_codes(m: int, n: int, k: int) -> Kept:
    """Count factors in 8 bits, with a scale per component: `Int8LowRankLinear`."""
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
    """Form in which compressed matrices are stored. Costs are in a unit, given by its name in `UNITS`."""

    low_rank: Callable[[int, int, int], Kept]
    """Numbers that store (m, n) at rank k."""
    dense: Callable[[int, int], Kept] = dense_weight
    """Numbers that store a dense (m, n)."""
    in_8_bits: Optional["Storage"] = None
    """The 8-bit alternative, if the selection rule chooses it for each matrix; None otherwise."""
    layer: str = "low_rank"
    """Kind of the layers that hold factors and are trained: a subclass of `LowRankLinear` or `PivotForm`. With
    `pivoted`, the shape of each matrix decides between rows and columns; see `registry.form_for`."""
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
    def has_pivots(self) -> bool:
        """True if layers hold pivot rows or columns, which need no order where that of a hidden width is free."""
        return self.layer == "pivoted"

    @property
    def weighs_rows(self) -> bool:
        """True if the rows and columns that stay in 16 bits can be chosen."""
        return self.rounded_except is not None

    def rounds_at(self, rank: int | None) -> bool:
        """Return True if a layer of this rank, None for dense, always ends in 8 bits."""
        return (self.rounded_dense if rank is None else self.rounded) is not None

    def low_rank_cost(self, m: int, n: int, rank: int, unit: str = "parameters") -> int:
        """Return the cost of a matrix (m, n) at a low rank."""
        return UNITS[unit](self.low_rank(m, n, rank))

    def dense_cost(self, m: int, n: int, unit: str = "parameters") -> int:
        """Return the cost of a matrix (m, n) that stays dense."""
        return UNITS[unit](self.dense(m, n))

    def stay_cost(self, m: int, n: int, unit: str = "parameters", present: Present | None = None) -> int:
        """Return the cost of a matrix (m, n) that stays as it is: dense, or in its present low-rank form."""
        return self.dense_cost(m, n, unit) if present is None else UNITS[unit](present.kept)

    def costs(self, m: int, n: int, unit: str = "parameters", present: Present | None = None) -> tuple[int, ...]:
        """Return the cost of (m, n) at each number of components from 0 to all.

        Above `highest_rank` it stays as it is.
        """
        return costs_in_steps(self, m, n, unit, present)

    def highest_rank(self, m: int, n: int, unit: str = "parameters", present: Present | None = None) -> int:
        """Return the largest rank at which (m, n) costs less than if it stays as it is, or 0 if there is none.

        The full rank is excluded, because a matrix from which nothing is dropped stays dense. For a matrix that is
        low-rank already, the result is at most its present rank.
        """
        ranks = range(min(m, n) if present is None else present.rank + 1)
        stays = self.stay_cost(m, n, unit, present)
        return max(0, bisect_left(ranks, stays, key=lambda k: self.low_rank_cost(m, n, k, unit)) - 1)


@lru_cache(maxsize=1024)
def costs_in_steps(
    storage: Storage, m: int, n: int, unit: str, present: Present | None = None, step: int = 1
) -> tuple[int, ...]:
    """Return the cost of (m, n) at each number of components from 0 to all, raised to the next multiple of `step`.

    Above the largest multiple that is at most `Storage.highest_rank`, it stays as it is.

    Example:
        >>> costs_in_steps(STORAGES["factors"], 6, 4, "parameters", step=2)
        (0, 20, 20, 24, 24)
    """
    highest = storage.highest_rank(m, n, unit, present) // step * step
    low_rank = [storage.low_rank_cost(m, n, -(-k // step) * step, unit) for k in range(highest + 1)]
    return (*low_rank, *[storage.stay_cost(m, n, unit, present)] * (min(m, n) - highest))


def break_even_rank(m: int, n: int) -> int:
    """Return the largest rank whose factors have fewer than `m n` numbers: `r* = (m n - 1) // (m + n)`.

    Example:
        >>> break_even_rank(100, 100)
        49
    """
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
`pivoted`: the same function in `k (m + n - k)` numbers, so that each rank but the full one is smaller than dense (PIFA,
arXiv 2501.19090). `remap`: 8 bits, except the rows or columns by which the larger factor exceeds the smaller (Dobi-SVD,
arXiv 2502.02723). `hq`: everything in 8 bits, which alone halves the size (half-quantized, arXiv 2602.02848). `mixed`:
each matrix as in `factors` or as in `hq`."""


ROWS_IN_16_BITS = ("last", "loss_aware")
"""Choices of the rows that `remap` leaves in 16 bits."""
