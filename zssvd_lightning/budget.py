"""What is asked, what each rank costs, and when it is met.

Shapes: a matrix is (m, n); a rank-k pair of factors stores k (m + n) numbers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from zssvd_lightning.errors import BudgetError

Shape = tuple[int, int]


def break_even_rank(m: int, n: int) -> int:
    """The largest rank whose factors store fewer than `m n` numbers: `r* = (m n - 1) // (m + n)`."""
    return (m * n - 1) // (m + n)


def stored_parameters(m: int, n: int, rank: int) -> int:
    """Numbers kept for an (m, n) matrix of which `rank` components are left; above break-even it stays dense."""
    return rank * (m + n) if rank <= break_even_rank(m, n) else m * n


@dataclass(frozen=True)
class Budget:
    """How many parameters have to go, and how low each rank may get.

    Raises:
        BudgetError: the rank floor leaves more parameters than `prune_ratio` allows.
    """

    shapes: Mapping[str, Shape]
    """Shape (m, n) of every target, in module order."""
    prune_ratio: float
    min_rank_fraction: float = 0.0

    def __post_init__(self) -> None:
        least = sum(self.stored(name, self.floor(name)) for name in self.shapes)
        if self.total - least < self.to_remove:
            raise BudgetError(
                f"prune_ratio {self.prune_ratio} asks for {self.to_remove:,} of {self.total:,} parameters, but with "
                f"min_rank_fraction {self.min_rank_fraction} at most {self.total - least:,} can go "
                f"({(self.total - least) / self.total:.3f}); lower one of the two, or target more layers"
            )

    @property
    def total(self) -> int:
        """Parameters of the targets while dense."""
        return sum(m * n for m, n in self.shapes.values())

    @property
    def to_remove(self) -> int:
        """Parameters that have to go."""
        return math.ceil(self.prune_ratio * self.total - 1e-9)

    def floor(self, name: str) -> int:
        """The lowest rank `name` may get: its share of the break-even rank, and never 0."""
        return max(1, math.ceil(self.min_rank_fraction * break_even_rank(*self.shapes[name]) - 1e-9))

    def stored(self, name: str, rank: int) -> int:
        """Numbers kept for `name` at `rank`."""
        return stored_parameters(*self.shapes[name], rank)

    def is_low_rank(self, name: str, rank: int) -> bool:
        """Whether factors at `rank` store less than the dense matrix does."""
        return rank <= break_even_rank(*self.shapes[name])

    def kept(self, ranks: Mapping[str, int | None]) -> int:
        """Numbers kept for all targets at these ranks, None being dense."""
        return sum(
            m * n if ranks[name] is None else self.stored(name, ranks[name] or 0)
            for name, (m, n) in self.shapes.items()
        )

    def reached(self, ranks: Mapping[str, int | None]) -> float:
        """Fraction of the parameters that goes at these ranks."""
        return (self.total - self.kept(ranks)) / self.total
