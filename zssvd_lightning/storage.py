"""How a matrix of some rank is kept, and so what each rank costs.

Shapes: a matrix is (m, n), of rank k. Costs are in 16-bit numbers, of which one in 8 bits is half.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Storage:
    """One way to keep matrices."""

    low_rank: Callable[[int, int, int], int]
    """Cost of (m, n) at rank k."""
    dense: Callable[[int, int], int]
    """Cost of (m, n) where it stays dense."""
    highest_rank: Callable[[int, int], int]
    """The largest rank at which (m, n) costs less than it does dense."""

    def cost(self, m: int, n: int, rank: int) -> int:
        """Cost of (m, n) of which `rank` components are left; above the highest rank it stays dense."""
        return self.low_rank(m, n, rank) if rank <= self.highest_rank(m, n) else self.dense(m, n)


def break_even_rank(m: int, n: int) -> int:
    """The largest rank whose factors have fewer than `m n` numbers: `r* = (m n - 1) // (m + n)`."""
    return (m * n - 1) // (m + n)


STORAGES = {
    "factors": Storage(lambda m, n, k: k * (m + n), lambda m, n: m * n, break_even_rank),
    "remap": Storage(lambda m, n, k: k * max(m, n), lambda m, n: m * n, lambda m, n: min(m, n) - 1),
    "hq": Storage(lambda m, n, k: -(-k * (m + n) // 2), lambda m, n: -(-m * n // 2), break_even_rank),
}
"""By name. `factors`: up and down, in the model's type. `remap`: in 8 bits, but for as many rows or columns of the
larger factor as it has more than the smaller (Dobi-SVD, arXiv 2502.02723). `hq`: everything in 8 bits, which takes half
of the budget alone (half-quantised, arXiv 2602.02848)."""

ROWS_IN_16_BITS = ("last", "loss_aware")
"""How `remap` chooses what stays in 16 bits."""
