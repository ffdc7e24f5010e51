"""Budget of a compression: how much to remove, and the cost of each rank in the chosen storage.

Shapes: a matrix is (m, n).
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from zssvd_lightning.errors import BudgetError
from zssvd_lightning.layers.storage import UNITS, Present, Shape, Storage, costs_in_steps, dense_weight
from zssvd_lightning.selection.storages import STORAGES

REFERENCES = ("dense", "present")
"""Values of `ratio_of`: what `prune_ratio` is a fraction of. They differ for matrices that are low-rank already."""


FEWEST_STEPS = 16
"""Least number of multiples of its step in the smaller side of a matrix."""


NONE: Mapping[str, Shape] = MappingProxyType({})
"""Narrower shapes where there are none."""


@dataclass(frozen=True)
class Budget:
    """Amount to remove, and the ranks each matrix may get.

    A matrix gets a rank of `ranks`, or stays as it is. Costs are in `unit`. The argument `eight_bit` of the methods
    states which matrices are stored in 8 bits, for storage that leaves this choice to selection.

    Raises:
        BudgetError: the lowest allowed ranks prevent reaching `prune_ratio`, or the storage alone or an earlier
            compression already reaches it.
    """

    shapes: Mapping[str, Shape]
    """Shape (m, n) of every target, in module order."""
    prune_ratio: float
    """Fraction to remove of the cost of the targets in 16 bits, counted as `ratio_of` says."""
    min_rank_fraction: float = 0.0
    """Rank floor of each matrix, as a fraction of its highest low rank."""
    storage: str = "factors"
    """Storage of the matrices: a key of `storages.STORAGES`."""
    planned: bool = False
    """True if the ranks come from a plan, so that `prune_ratio` is not checked."""
    unit: str = "parameters"
    """Unit of costs: a key of `layers.storage.UNITS`."""
    present: Mapping[str, Present] = field(default_factory=dict)
    """Present form of the targets that are low-rank already. Such a matrix stays as it is instead of dense."""
    ratio_of: str = "dense"
    """What `prune_ratio` is a fraction of: the `dense` targets, or the targets as they are at `present`."""
    rank_multiple: int = 1
    """Number whose multiples are the ranks of large matrices. Smaller matrices have a finer step: see `step`."""

    def __post_init__(self) -> None:
        if self.planned:
            return
        most = self.total - sum(self._least(name) for name in self.shapes)
        if most < self.to_remove:
            raise BudgetError(
                f"prune_ratio {self.prune_ratio} asks for {self.to_remove:,} of {self.total:,} {self.unit}, but with "
                f"min_rank_fraction {self.min_rank_fraction}{self._and_multiple} at most {most:,} can go "
                f"({most / self.total:.3f}); lower one of them, or target more layers"
            )
        stays = dict.fromkeys(self.shapes)
        if self.total - self.kept(stays) >= self.to_remove:
            if self.present:
                raise BudgetError(
                    f"prune_ratio {self.prune_ratio} of the {self.unit} is reached already: the low-rank layers leave "
                    f"{self.kept(stays):,} of {self.total:,} ({self.reached(stays):.4f} removed); ask for more, or for "
                    "a part of the present model with ratio_of='present'"
                )
            raise BudgetError(
                f"prune_ratio {self.prune_ratio} of the {self.unit} is reached by storage {self.storage!r} alone, with "
                "nothing dropped; ask for more"
            )

    @property
    def total(self) -> int:
        """Cost of all targets in 16 bits that `prune_ratio` is a fraction of."""
        return sum(self.reference(name) for name in self.shapes)

    @property
    def before(self) -> int:
        """Cost of all targets in 16 bits before the compression."""
        return sum(self.before_of(name) for name in self.shapes)

    @property
    def of_parameters(self) -> float | None:
        """Fraction of the targets' parameters to remove; None if something else is counted, or a plan is followed."""
        plain = self.unit == "parameters" and not self.present and not self.planned
        return self.prune_ratio if plain else None

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
        return self.dense_of(self.shapes[name])

    def dense_of(self, shape: Shape) -> int:
        """Return the cost of a dense matrix of any shape in 16 bits."""
        return UNITS[self.unit](dense_weight(*shape))

    def before_of(self, name: str) -> int:
        """Return the cost of the matrix `name` in 16 bits before the compression."""
        present = self.present.get(name)
        return self.dense(name) if present is None else UNITS[self.unit](present.kept)

    def reference(self, name: str) -> int:
        """Return the cost of the matrix `name` in 16 bits that `prune_ratio` is a fraction of."""
        return self.dense(name) if self.ratio_of == "dense" else self.before_of(name)

    def step(self, name: str) -> int:
        """Return the number whose multiples are the ranks of `name`.

        It is `rank_multiple` if the smaller side of `name` has at least 16 multiples of it. Otherwise, and if no
        multiple saves anything, it is the largest power of two for which that holds, or 1.
        """
        return self._step_of(min(self._saving_rank(name, eight_bit=False), min(self.shapes[name]) // FEWEST_STEPS))

    def step_of_width(self, h: int) -> int:
        """Return the number whose multiples are the sizes of a hidden width of h units, by the rule of `step`."""
        return self._step_of(h // FEWEST_STEPS)

    def floor_of_width(self, h: int) -> int:
        """Return the lowest size of a hidden width of h units: `min_rank_fraction` of it, in whole steps."""
        step = self.step_of_width(h)
        return max(1, math.ceil(self.min_rank_fraction * h / step - 1e-9)) * step

    def floor(self, name: str) -> int:
        """Return the lowest rank `name` may get: `min_rank_fraction` of its highest rank that saves, in whole steps."""
        step = self.step(name)
        least = math.ceil(self.min_rank_fraction * self._saving_rank(name, eight_bit=False) - 1e-9)
        return max(step, min(-(-least // step) * step, self.highest_rank(name)))

    def highest_rank(self, name: str, *, eight_bit: bool = False) -> int:
        """Return the largest rank at which `name` gets a new low-rank form. Above it, `name` stays as it is."""
        step = self.step(name)
        return self._saving_rank(name, eight_bit=eight_bit) // step * step

    def ranks(self, name: str, *, eight_bit: bool = False) -> range:
        """Return the ranks at which `name` may get a new low-rank form, ascending. There may be none."""
        return range(self.floor(name), self.highest_rank(name, eight_bit=eight_bit) + 1, self.step(name))

    def stops(self, name: str) -> tuple[int, ...]:
        """Return the numbers of remaining components of `name` between which a rule goes in one step, ascending.

        They are the allowed ranks, and every number above the highest, where `name` stays as it is.
        """
        ranks = self.ranks(name)
        return (*ranks, *range(max(ranks, default=0) + 1, min(self.shapes[name]) + 1))

    def rounded_up(self, name: str, rank: int, *, eight_bit: bool = False) -> int:
        """Return the next number of components of `name`, from `rank` on, that is a multiple of its step.

        Above the highest rank, where `name` stays as it is, `rank` itself is returned.
        """
        multiple = -(-rank // self.step(name)) * self.step(name)
        return multiple if multiple <= self.highest_rank(name, eight_bit=eight_bit) else rank

    def costs(self, name: str, *, eight_bit: bool = False) -> tuple[int, ...]:
        """Return the cost of `name` at each number of remaining components, from 0 to all. Costs never decrease.

        A number that is no multiple of the step costs as much as the next one, to which `rules.of_ranks` raises it.
        """
        storage, shape, present = self._storage(eight_bit), self.shapes[name], self.present.get(name)
        return costs_in_steps(storage, *shape, self.unit, present, self.step(name))

    @property
    def most_components(self) -> dict[str, int]:
        """Largest number of components of each target that any new low-rank form of it has."""
        return {
            name: max(self.highest_rank(name, eight_bit=eight_bit) for eight_bit in self.bit_choices)
            for name in self.shapes
        }

    def component_cost(self, name: str) -> float:
        """Return the mean cost of a component of `name` at its highest low rank."""
        rank = max(1, self.highest_rank(name))
        return self.costs(name)[rank] / rank

    def kept_of(
        self, name: str, rank: int | None, *, eight_bit: bool = False, narrower: Mapping[str, Shape] = NONE
    ) -> int:
        """Return the cost of `name` at `rank`, where None means as it is, and 0 that it is removed.

        Args:
            name: the matrix.
            rank: its rank.
            eight_bit: True if it is stored in 8 bits.
            narrower: shapes of the dense matrices whose outputs or inputs are fewer, by name.
        """
        storage, shape = self._storage(eight_bit), self.shapes[name]
        if name in narrower:
            return self.dense_of(narrower[name])
        if rank is None:
            return storage.stay_cost(*shape, self.unit, self.present.get(name))
        if rank == 0:
            return 0
        return storage.low_rank_cost(*shape, rank, self.unit)

    def is_low_rank(self, name: str, rank: int, *, eight_bit: bool = False) -> bool:
        """Return whether `name` costs less at `rank` than as it is."""
        return rank <= self.highest_rank(name, eight_bit=eight_bit)

    def stays_low_rank(self, name: str, rank: int | None) -> bool:
        """Return whether `name` at `rank` stays as it is and is low-rank already."""
        return rank is None and name in self.present

    def kept(
        self,
        ranks: Mapping[str, int | None],
        eight_bit: Collection[str] = (),
        narrower: Mapping[str, Shape] = NONE,
    ) -> int:
        """Return the cost of all targets at these ranks; see `kept_of`."""
        return sum(
            self.kept_of(name, ranks[name], eight_bit=name in eight_bit, narrower=narrower) for name in self.shapes
        )

    def reached(
        self,
        ranks: Mapping[str, int | None],
        eight_bit: Collection[str] = (),
        narrower: Mapping[str, Shape] = NONE,
    ) -> float:
        """Return the fraction of `total` that is removed, together with earlier compressions if it is dense."""
        return (self.total - self.kept(ranks, eight_bit, narrower)) / self.total

    def after(self, truncation: int, of: int) -> "Budget":
        """Return the budget of one of several truncations: what the storage saves, and an equal share of the rest each.

        Args:
            truncation: number of the truncation, from 1.
            of: number of truncations.
        """
        if truncation >= of:
            return self
        alone = self.reached(dict.fromkeys(self.shapes))
        return replace(self, prune_ratio=alone + truncation / of * (self.prune_ratio - alone))

    def counted_in(self, unit: str) -> "Budget":
        """Return a budget with the same targets and storage in another unit, for counting only: nothing is checked."""
        return replace(self, unit=unit, planned=True)

    @property
    def _and_multiple(self) -> str:
        """Part of an error message: the multiple, if a matrix has steps of more than one component."""
        return f" and rank_multiple {self.rank_multiple}" if any(self.step(name) > 1 for name in self.shapes) else ""

    def _step_of(self, most: int) -> int:
        """Return the multiple if it is at most `most`; else the largest power of two for which that holds, or 1."""
        return self.rank_multiple if self.rank_multiple <= most else 1 << max(0, most.bit_length() - 1)

    def _saving_rank(self, name: str, *, eight_bit: bool) -> int:
        """Return the largest rank at which `name` costs less than as it is."""
        return self._storage(eight_bit).highest_rank(*self.shapes[name], self.unit, self.present.get(name))

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
