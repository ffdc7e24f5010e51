"""Rank plans: files with a rank per layer that a dry run writes, a person reviews and a compression follows."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from zssvd_lightning._files import checked_path, replacing_file
from zssvd_lightning._yaml import UnfitYAMLError, check_yaml, read_yaml_text
from zssvd_lightning.errors import OutputError, PlanError
from zssvd_lightning.layers.storage import Present, Shape
from zssvd_lightning.selection.budget import Budget
from zssvd_lightning.selection.components import Components, Selection
from zssvd_lightning.selection.rules import Rule, of_ranks
from zssvd_lightning.selection.storages import STORAGES

VERSION = 1
"""Version of the file format."""


DENSE = "dense"
"""Rank entry of a layer that stays dense."""


PRESENT = "present"
"""Rank entry of a layer that is low-rank already and stays as it is."""


HEADER = """\
# The rank of every layer. Change any to a number up to break_even, or to {stays}, and compress with plan: this file.
# reached and first_order_sum (over the dropped components, nats) are those of the ranks as they were written.
"""


MULTIPLE_HEADER = """\
# Ranks are multiples of {multiple} (of a smaller power of two in small layers), with which hardware computes fastest. A
# rank that you change may be any.
"""


BITS_HEADER = "# A layer with bits: 8 is kept in 8 bits, any other in 16.\n"


@dataclass(frozen=True)
class Plan:
    """Rank of every layer, and the cost it leads to."""

    ranks: Mapping[str, int | None]
    """Name -> number of remaining components. None if the layer stays as it is."""
    shapes: Mapping[str, Shape]
    """Name -> shape (m, n)."""
    reached: float
    """Fraction of the target layers' cost that these ranks remove, as `Budget.reached` counts it."""
    highest: Mapping[str, int]
    """Name -> largest rank at which the layer costs less than as it is."""
    storage: str = "factors"
    """Storage of the layers: a key of `storages.STORAGES`."""
    drifts: Mapping[str, float] | None = None
    """Name -> first-order sum over its dropped components, nats. None for a plan read from a file. Layers that
    calibration has not reached are not in it."""
    eight_bit: frozenset[str] = frozenset()
    """Names of the layers to store in 8 bits, if the storage offers the choice."""
    unit: str = "parameters"
    """Unit of costs: a key of `layers.storage.UNITS`."""
    present: frozenset[str] = frozenset()
    """Names of the layers that are low-rank already."""
    rank_multiple: int = 1
    """Number whose multiples selection chose from. 1 for a plan read from a file, which may have any ranks."""

    @classmethod
    def of(
        cls,
        selection: Selection,
        budget: Budget,
        shapes: Mapping[str, Shape] | None = None,
        present: Mapping[str, Present] | None = None,
    ) -> "Plan":
        """Make a plan with the ranks of a selection.

        Args:
            selection: the selection.
            budget: budget of the selection, to which `reached` refers.
            shapes: shape (m, n) of all layers of the plan, of which those without a rank stay as they are. None if the
                selection has them all.
            present: form of those that are low-rank already. None if the budget has them all.
        """
        ranks = {name: selection.rank(name) for name in budget.shapes}
        rank_multiple, budget = budget.rank_multiple, _of_any_rank(budget)
        plan = cls._of_ranks(ranks, selection.eight_bit, budget, selection.drifts)
        low_rank = budget.present if present is None else present
        every = replace(budget, shapes=shapes or budget.shapes, planned=True, present=low_rank)
        highest = {name: plan.highest.get(name, every.highest_rank(name)) for name in every.shapes}
        ranks = {name: ranks.get(name) for name in every.shapes}
        return replace(
            plan,
            ranks=ranks,
            shapes=every.shapes,
            highest=highest,
            present=frozenset(low_rank),
            rank_multiple=rank_multiple,
        )

    @classmethod
    def read(cls, path: str | Path, budget: Budget) -> "Plan":
        """Read a plan for the layers of `budget` from a YAML file.

        Raises:
            PlanError: the file is missing, is not a plan, or does not match the layers, storage or unit of `budget`.
                The message says which.
        """
        budget = _of_any_rank(budget)
        layers = _layers(Path(path), budget)
        if others := sorted(layers.keys() ^ budget.shapes.keys()):
            raise PlanError(
                f"plan {path} is for other layers: {len(others)} are in one of plan and model only "
                f"({', '.join(others[:3])}); plan with the same include and ignore, and give layers to leave alone "
                f"rank: {_stays(budget.present)}"
            )
        eight_bit = frozenset(name for name in budget.shapes if _in_8_bits(path, name, layers[name], budget))
        ranks = {name: _rank(path, name, layers[name], budget, name in eight_bit) for name in budget.shapes}
        return cls._of_ranks(ranks, eight_bit, budget)

    @classmethod
    def _of_ranks(
        cls,
        ranks: Mapping[str, int | None],
        eight_bit: frozenset[str],
        budget: Budget,
        drifts: Mapping[str, float] | None = None,
    ) -> "Plan":
        reached = budget.reached(ranks, eight_bit)
        highest = {name: budget.highest_rank(name, eight_bit=name in eight_bit) for name in budget.shapes}
        present = frozenset(budget.present)
        return cls(ranks, budget.shapes, reached, highest, budget.storage, drifts, eight_bit, budget.unit, present)

    def write(self, path: str | Path) -> None:
        """Write the plan as YAML.

        Raises:
            OutputError: the file exists already or cannot be written.
        """
        path = check_plan_output(path)
        content = {
            "version": VERSION,
            "storage": self.storage,
            "unit": self.unit,
            "reached": round(self.reached, 6),
            "first_order_sum": None if self.drifts is None else float(f"{sum(self.drifts.values()):.6g}"),
            "layers": {name: self._entry(name) for name in self.ranks},
        }
        header = HEADER.format(stays=_stays(self.present)) + (BITS_HEADER if STORAGES[self.storage].in_8_bits else "")
        header += MULTIPLE_HEADER.format(multiple=self.rank_multiple) if self.rank_multiple > 1 else ""
        text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120)
        with replacing_file(path) as file:
            file.write_text(header + text, encoding="utf-8")

    @property
    def rule(self) -> Rule:
        """Rule that follows this plan."""
        return Rule(self._select, chooses_bits=True, keeps_largest=True)

    def _select(self, matrices: Mapping[str, Components], budget: Budget) -> Selection:
        full = {name: len(components.sigma) for name, components in matrices.items()}
        ranks = {name: full[name] if k is None else k for name, k in self.ranks.items() if name in matrices}
        return of_ranks(matrices, _of_any_rank(budget), ranks, self.eight_bit & matrices.keys())

    def _entry(self, name: str) -> dict[str, Any]:
        rank, shape = self.ranks[name], self.shapes[name]
        stays = PRESENT if name in self.present else DENSE
        entry: dict[str, Any] = {"rank": stays if rank is None else rank, "break_even": self.highest[name]}
        if name in self.eight_bit:
            entry["bits"] = 8
        if self.drifts is not None and name in self.drifts:
            entry["first_order_sum"] = float(f"{self.drifts[name]:.3g}")
        return entry | {"shape": list(shape)}


def _of_any_rank(budget: Budget) -> Budget:
    """Return the budget of a plan: its ranks are followed as they are, whether or not they are multiples."""
    return replace(budget, planned=True, rank_multiple=1)


def check_plan_output(path: str | Path) -> Path:
    """Return the absolute path of a new plan file.

    Raises:
        OutputError: the file exists already and may hold reviewed ranks, or its path is impossible.
    """
    path = checked_path(path, OutputError, "plan").absolute()
    if path.exists():
        raise OutputError(f"plan {path} exists, and a dry run would overwrite it; name another file, or remove it")
    return path


def _stays(present: Collection[str]) -> str:
    """Return the rank entries of layers that stay as they are, for a message."""
    return f"{DENSE} ({PRESENT} for a layer that is low-rank already)" if present else DENSE


def _layers(path: Path, budget: Budget) -> dict[str, Any]:
    try:
        text = read_yaml_text(checked_path(path, PlanError, "plan"))
        check_yaml(text)
        loaded = yaml.safe_load(text)
    except (UnfitYAMLError, ValueError) as error:
        if isinstance(error, PlanError):
            raise
        raise PlanError(f"plan {path} cannot be read: {error}; a dry run writes one") from error
    if not isinstance(loaded, dict) or not isinstance(loaded.get("layers"), dict):
        raise PlanError(f"plan {path} has no mapping 'layers'; a dry run writes one")
    if loaded.get("version") != VERSION:
        raise PlanError(f"plan {path} is of version {loaded.get('version')!r}, this release reads {VERSION}")
    for key, default, wanted in (("storage", "factors", budget.storage), ("unit", "parameters", budget.unit)):
        if loaded.get(key, default) != wanted:
            raise PlanError(f"plan {path} is for {key} {loaded.get(key, default)!r}, and it is to be {wanted!r}")
    layers: dict[str, Any] = loaded["layers"]
    return layers


def _in_8_bits(path: str | Path, name: str, entry: Any, budget: Budget) -> bool:
    if not isinstance(entry, dict) or "bits" not in entry:
        return False
    if not budget.chooses_bits or entry["bits"] not in (8, 16):
        possible = "they must be 8 or 16" if budget.chooses_bits else f"storage {budget.storage!r} leaves no choice"
        raise PlanError(f"plan {path} gives {name} bits {entry['bits']!r}; {possible}")
    return bool(entry["bits"] == 8)


def _rank(path: str | Path, name: str, entry: Any, budget: Budget, eight_bit: bool) -> int | None:
    shape, highest = budget.shapes[name], budget.highest_rank(name, eight_bit=eight_bit)
    rank = entry.get("rank") if isinstance(entry, dict) else None
    if isinstance(entry, dict) and list(entry.get("shape", shape)) != list(shape):
        raise PlanError(f"plan {path} has {name} as {entry['shape']}, but it is {list(shape)} in the model")
    stays = PRESENT if name in budget.present else DENSE
    if rank == stays:
        return None
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= highest:
        raise PlanError(
            f"plan {path} gives {name} {shape} rank {rank!r}; it must be 1 to {highest}, above which storage "
            f"{budget.storage!r} takes more than the layer does, or {stays}"
        )
    return rank
