"""Budget of a compression: how much to remove, and the cost of each rank in the chosen storage.

Shapes: a matrix is (m, n).
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from zssvd_lightning.errors import BudgetError
from zssvd_lightning.layers.storage import UNITS, Storage, dense_weight
from zssvd_lightning.selection.storages import STORAGES

Shape = tuple[int, int]
"""Shape (m, n) of a matrix: outputs, inputs."""


@dataclass(frozen=True)
class Budget:
    """Amount to remove, and the lowest rank each matrix may get.

    Costs are in `unit`. The argument `eight_bit` of the methods states which matrices are stored in 8 bits, for storage
    that leaves this choice to selection.

    Raises:
        BudgetError: the rank floor prevents reaching `prune_ratio`, or the storage alone already reaches it.
    """

    shapes: Mapping[str, Shape]
    """Shape (m, n) of every target, in module order."""
    prune_ratio: float
    """Fraction to remove of the cost of the dense targets in 16 bits."""
    min_rank_fraction: float = 0.0
    """Rank floor of each matrix, as a fraction of its highest low rank."""
    storage: str = "factors"
    """Storage of the matrices: a key of `storages.STORAGES`."""
    planned: bool = False
    """True if the ranks come from a plan, so that `prune_ratio` is not checked."""
    unit: str = "parameters"
    """Unit of costs: a key of `layers.storage.UNITS`."""

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
        """Cost of all dense targets in 16 bits."""
        return sum(self.dense(name) for name in self.shapes)

    @property
    def to_remove(self) -> int:
        """Cost that must be removed."""
        return math.ceil(self.prune_ratio * self.total - 1e-9)

    @property
    def allowed(self) -> int:
        """Cost that may remain."""
        return self.total - self.to_remove

    @property
    def chooses_bits(self) -> bool:
        """True if selection decides for each matrix between 8 and 16 bits."""
        return STORAGES[self.storage].in_8_bits is not None

    @property
    def bit_choices(self) -> tuple[bool, ...]:
        """Possible values of `eight_bit`."""
        return (False, True) if self.chooses_bits else (False,)

    def dense(self, name: str) -> int:
        """Return the cost of the dense matrix `name` in 16 bits."""
        return UNITS[self.unit](dense_weight(*self.shapes[name]))

    def floor(self, name: str) -> int:
        """Return the lowest rank `name` may get: `min_rank_fraction` of its highest low rank, at least 1."""
        return max(1, math.ceil(self.min_rank_fraction * self.highest_rank(name) - 1e-9))

    def highest_rank(self, name: str, *, eight_bit: bool = False) -> int:
        """Return the largest rank at which `name` is stored low-rank. Above it, `name` stays dense."""
        return self._storage(eight_bit).highest_rank(*self.shapes[name], self.unit)

    def costs(self, name: str, *, eight_bit: bool = False) -> tuple[int, ...]:
        """Return the cost of `name` at each number of remaining components, from 0 to all. Costs never decrease."""
        return self._storage(eight_bit).costs(*self.shapes[name], self.unit)

    def component_cost(self, name: str) -> float:
        """Return the mean cost of a component of `name` at its highest low rank."""
        rank = max(1, self.highest_rank(name))
        return self.costs(name)[rank] / rank

    def kept_of(self, name: str, rank: int | None, *, eight_bit: bool = False) -> int:
        """Return the cost of `name` at `rank`, where None means dense."""
        storage, shape = self._storage(eight_bit), self.shapes[name]
        if rank is None:
            return storage.dense_cost(*shape, self.unit)
        return storage.low_rank_cost(*shape, rank, self.unit)

    def is_low_rank(self, name: str, rank: int, *, eight_bit: bool = False) -> bool:
        """Return whether `name` costs less at `rank` than dense."""
        return rank <= self.highest_rank(name, eight_bit=eight_bit)

    def kept(self, ranks: Mapping[str, int | None], eight_bit: Collection[str] = ()) -> int:
        """Return the cost of all targets at these ranks, where None means dense."""
        return sum(self.kept_of(name, ranks[name], eight_bit=name in eight_bit) for name in self.shapes)

    def reached(self, ranks: Mapping[str, int | None], eight_bit: Collection[str] = ()) -> float:
        """Return the fraction of the cost that these ranks remove."""
        return (self.total - self.kept(ranks, eight_bit)) / self.total

    def counted_in(self, unit: str) -> "Budget":
        """Return a budget with the same targets and storage in another unit, for counting only: nothing is checked."""
        return replace(self, unit=unit, planned=True)

    def _least(self, name: str) -> int:
        """Return the lowest possible cost of `name`."""
        return min(self.costs(name, eight_bit=eight_bit)[self.floor(name)] for eight_bit in self.bit_choices)

    def _storage(self, eight_bit: bool) -> Storage:
        storage = STORAGES[self.storage]
        if not eight_bit:
            return storage
        if storage.in_8_bits is None:
            raise ValueError(f"storage {self.storage!r} leaves no choice of bits")
        return storage.in_8_bits
