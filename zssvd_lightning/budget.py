"""What is asked, and when it is met. What a rank costs is for `storage` to say.

Shapes: a matrix is (m, n).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from zssvd_lightning.errors import BudgetError
from zssvd_lightning.storage import STORAGES

Shape = tuple[int, int]


@dataclass(frozen=True)
class Budget:
    """How many parameters have to go, and how low each rank may get. Two numbers in 8 bits count as one.

    Raises:
        BudgetError: the rank floor leaves more parameters than `prune_ratio` allows, or the storage alone removes as
            many as it asks for.
    """

    shapes: Mapping[str, Shape]
    """Shape (m, n) of every target, in module order."""
    prune_ratio: float
    min_rank_fraction: float = 0.0
    storage: str = "factors"
    """How matrices are kept, by its name in `storage.STORAGES`."""
    planned: bool = False
    """Whether ranks come from a plan, so that `prune_ratio` asks for nothing."""

    def __post_init__(self) -> None:
        if self.planned:
            return
        least = sum(self.stored(name, self.floor(name)) for name in self.shapes)
        if self.total - least < self.to_remove:
            raise BudgetError(
                f"prune_ratio {self.prune_ratio} asks for {self.to_remove:,} of {self.total:,} parameters, but with "
                f"min_rank_fraction {self.min_rank_fraction} at most {self.total - least:,} can go "
                f"({(self.total - least) / self.total:.3f}); lower one of the two, or target more layers"
            )
        if self.total - self.kept(dict.fromkeys(self.shapes)) >= self.to_remove:
            raise BudgetError(
                f"prune_ratio {self.prune_ratio} is reached by storage {self.storage!r} alone, with nothing dropped; "
                "ask for more"
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
        """The lowest rank `name` may get: its share of the highest low rank, and never 0."""
        return max(1, math.ceil(self.min_rank_fraction * self.highest_rank(name) - 1e-9))

    def highest_rank(self, name: str) -> int:
        """The largest rank at which `name` is low-rank; above it, it stays dense."""
        return STORAGES[self.storage].highest_rank(*self.shapes[name])

    def stored(self, name: str, rank: int) -> int:
        """Numbers kept for `name` at `rank`."""
        return STORAGES[self.storage].cost(*self.shapes[name], rank)

    def kept_of(self, name: str, rank: int | None) -> int:
        """Numbers kept for `name` at `rank`, None being dense."""
        return self.stored(name, min(self.shapes[name]) if rank is None else rank)

    def is_low_rank(self, name: str, rank: int) -> bool:
        """Whether `name` takes less at `rank` than it does dense."""
        return rank <= self.highest_rank(name)

    def kept(self, ranks: Mapping[str, int | None]) -> int:
        """Numbers kept for all targets at these ranks, None being dense."""
        return sum(self.kept_of(name, ranks[name]) for name in self.shapes)

    def reached(self, ranks: Mapping[str, int | None]) -> float:
        """Fraction of the parameters that goes at these ranks."""
        return (self.total - self.kept(ranks)) / self.total
