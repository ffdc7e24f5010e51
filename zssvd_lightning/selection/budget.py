"""What is asked, and when it is met. What a rank costs is for `storage` to say.

Shapes: a matrix is (m, n).
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from zssvd_lightning.errors import BudgetError
from zssvd_lightning.layers.storage import STORAGES, UNITS, Storage, dense_weight

Shape = tuple[int, int]


@dataclass(frozen=True)
class Budget:
    """How much has to go, and how low each rank may get.

    Costs are in `unit`; `eight_bit` says which matrices are kept in 8 bits, where storage leaves that to be chosen.

    Raises:
        BudgetError: the rank floor leaves more than `prune_ratio` allows, or the storage alone removes as much as it
            asks for.
    """

    shapes: Mapping[str, Shape]
    """Shape (m, n) of every target, in module order."""
    prune_ratio: float
    """Fraction of what the targets cost dense in 16 bits."""
    min_rank_fraction: float = 0.0
    storage: str = "factors"
    """How matrices are kept, by its name in `storage.STORAGES`."""
    planned: bool = False
    """Whether ranks come from a plan, so that `prune_ratio` asks for nothing."""
    unit: str = "parameters"
    """What costs are counted in, by its name in `storage.UNITS`."""

    def __post_init__(self) -> None:
        if self.planned:
            return
        most = self.total - sum(self._least(name) for name in self.shapes)
        if most < self.to_remove:
            raise BudgetError(
                f"prune_ratio {self.prune_ratio} asks for {self.to_remove:,} of {self.total:,} {self.unit}, but with "
                f"min_rank_fraction {self.min_rank_fraction} at most {most:,} can go ({most / self.total:.3f}); lower "
                "one of the two, or target more layers"
            )
        if self.total - self.kept(dict.fromkeys(self.shapes)) >= self.to_remove:
            raise BudgetError(
                f"prune_ratio {self.prune_ratio} of the {self.unit} is reached by storage {self.storage!r} alone, with "
                "nothing dropped; ask for more"
            )

    @property
    def total(self) -> int:
        """Cost of the targets while dense in 16 bits."""
        return sum(self.dense(name) for name in self.shapes)

    @property
    def to_remove(self) -> int:
        """How much has to go."""
        return math.ceil(self.prune_ratio * self.total - 1e-9)

    @property
    def allowed(self) -> int:
        """How much may stay."""
        return self.total - self.to_remove

    @property
    def chooses_bits(self) -> bool:
        """Whether each matrix is kept in 8 or in 16 bits, as selection says."""
        return STORAGES[self.storage].in_8_bits is not None

    @property
    def bit_choices(self) -> tuple[bool, ...]:
        """The values that `eight_bit` may have."""
        return (False, True) if self.chooses_bits else (False,)

    def dense(self, name: str) -> int:
        """Cost of `name` while dense in 16 bits."""
        return UNITS[self.unit](dense_weight(*self.shapes[name]))

    def floor(self, name: str) -> int:
        """The lowest rank `name` may get: its share of the highest low rank, and never 0."""
        return max(1, math.ceil(self.min_rank_fraction * self.highest_rank(name) - 1e-9))

    def highest_rank(self, name: str, *, eight_bit: bool = False) -> int:
        """The largest rank at which `name` is low-rank; above it, it stays dense."""
        return self._storage(eight_bit).highest_rank(*self.shapes[name], self.unit)

    def costs(self, name: str, *, eight_bit: bool = False) -> tuple[int, ...]:
        """Cost of `name` by how many components are left, from 0 to all; never falling."""
        return self._storage(eight_bit).costs(*self.shapes[name], self.unit)

    def component_cost(self, name: str) -> float:
        """Cost of a component of `name` on average, at the highest rank that saves anything."""
        rank = max(1, self.highest_rank(name))
        return self.costs(name)[rank] / rank

    def kept_of(self, name: str, rank: int | None, *, eight_bit: bool = False) -> int:
        """What is kept of `name` at `rank`, None being dense."""
        storage, shape = self._storage(eight_bit), self.shapes[name]
        if rank is None:
            return storage.dense_cost(*shape, self.unit)
        return storage.low_rank_cost(*shape, rank, self.unit)

    def is_low_rank(self, name: str, rank: int, *, eight_bit: bool = False) -> bool:
        """Whether `name` takes less at `rank` than it does dense."""
        return rank <= self.highest_rank(name, eight_bit=eight_bit)

    def kept(self, ranks: Mapping[str, int | None], eight_bit: Collection[str] = ()) -> int:
        """What is kept of all targets at these ranks, None being dense."""
        return sum(self.kept_of(name, ranks[name], eight_bit=name in eight_bit) for name in self.shapes)

    def reached(self, ranks: Mapping[str, int | None], eight_bit: Collection[str] = ()) -> float:
        """Fraction of the cost that goes at these ranks."""
        return (self.total - self.kept(ranks, eight_bit)) / self.total

    def counted_in(self, unit: str) -> "Budget":
        """The same targets and storage in another unit, to count with: it asks for nothing."""
        return replace(self, unit=unit, planned=True)

    def _least(self, name: str) -> int:
        """The least that can be kept of `name`."""
        return min(self.costs(name, eight_bit=eight_bit)[self.floor(name)] for eight_bit in self.bit_choices)

    def _storage(self, eight_bit: bool) -> Storage:
        storage = STORAGES[self.storage]
        if not eight_bit:
            return storage
        if storage.in_8_bits is None:
            raise ValueError(f"storage {self.storage!r} leaves no choice of bits")
        return storage.in_8_bits
