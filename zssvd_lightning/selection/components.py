"""Input and output of a selection rule: the components of each layer, and the selection."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from zssvd_lightning.layers.storage import Shape
from zssvd_lightning.selection.walk import Walk


@dataclass(frozen=True)
class Components:
    """Components of one matrix, as input to selection."""

    sigma: Tensor
    """Singular values (r,), descending."""
    delta: Tensor
    """Predicted first-order change of the loss (r,) from dropping each component."""
    rounding: Tensor | None = None
    """Predicted change of the loss (r,) from storing each component in 8 bits instead of 16."""
    rounding_dense: float | None = None
    """Predicted change of the loss from storing the dense weight in 8 bits instead of 16."""
    curvature: Tensor | None = None
    """Curvature of the loss along each unit-size component (r,). None if not estimated, which counts as 1."""

    @property
    def second_order(self) -> Tensor:
        """Second-order change of the loss (r,) from dropping each component: `1/2 sigma^2` times the curvature."""
        loss = self.sigma.double().square() / 2
        return loss if self.curvature is None else loss * self.curvature.double()


class Narrowed(NamedTuple):
    """Hidden width with fewer units. The layers that meet in it stay dense."""

    producers: tuple[str, ...]
    """Names of the layers that write it, which have fewer outputs."""
    units: Tensor
    """Ascending numbers (w,) of the remaining units."""


@dataclass(frozen=True)
class Selection:
    """Components that remain in each matrix."""

    kept: Mapping[str, Tensor | None]
    """Name -> ascending indices (k,) of the remaining components. None if the matrix stays as it is. No index if it is
    removed with its expert."""
    drifts: Mapping[str, float]
    """Name -> sum of delta over the dropped components. Those of a removed expert have equal parts of its change."""
    eight_bit: frozenset[str] = frozenset()
    """Names of the matrices to store in 8 bits, if selection chooses the bits."""
    removal_loss: float = field(default=0.0, compare=False)
    """Second-order change of the loss from removing the experts whose matrices have rank 0, and the hidden units that
    `narrowed` lacks; it is not saved."""
    walk: Walk | None = field(default=None, compare=False)
    """Running sum over the removals, for a rule that drops one component after another; it is not saved."""
    narrowed: Mapping[str, Narrowed] = field(default_factory=dict)
    """Name of the layer that reads a hidden width -> what remains of the width, if units are removed."""

    @property
    def first_order_sum(self) -> float:
        """Sum of delta over all dropped components."""
        return sum(self.drifts.values())

    @property
    def removed(self) -> list[str]:
        """Names of the matrices of removed experts."""
        return [name for name, kept in self.kept.items() if kept is not None and not len(kept)]

    @property
    def of_narrowed(self) -> list[str]:
        """Names of the layers with fewer outputs or inputs."""
        return [name for consumer, found in self.narrowed.items() for name in (*found.producers, consumer)]

    def narrower(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Return the shape of each layer with fewer outputs or inputs, given those (m, n) of all layers."""
        found: dict[str, Shape] = {}
        for consumer, (producers, units) in self.narrowed.items():
            found |= {name: (len(units), shapes[name][1]) for name in producers}
            found[consumer] = (shapes[consumer][0], len(units))
        return found

    def units_of(self, name: str, shapes: Mapping[str, Shape]) -> tuple[int, int] | None:
        """Return the units after and before of the narrower width that a layer writes or reads, if there is one."""
        for consumer, (producers, units) in self.narrowed.items():
            if name in (*producers, consumer):
                return len(units), shapes[consumer][1]
        return None

    def rank(self, name: str) -> int | None:
        """Return the number of remaining components of `name`, or None if it stays as it is."""
        kept = self.kept[name]
        return None if kept is None else len(kept)

    def dropped_second_order(self, matrices: Mapping[str, Components]) -> float:
        """Return the second-order change of the loss by all dropped components of `matrices`, and removals."""
        losses = {name: components.second_order for name, components in matrices.items()}
        dropped = {
            name: losses[name].sum() - losses[name][kept].sum()
            for name, kept in self.kept.items()
            if kept is not None and len(kept) and name in losses
        }
        return max(0.0, float(sum(dropped.values())) + self.removal_loss)

    def state_dict(self) -> dict[str, Any]:
        """Return the selection as plain types, for `of_state`."""
        return {
            "kept": {name: None if kept is None else kept.tolist() for name, kept in self.kept.items()},
            "drifts": dict(self.drifts),
            "eight_bit": sorted(self.eight_bit),
            "narrowed": {name: [list(found.producers), found.units.tolist()] for name, found in self.narrowed.items()},
        }

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Self:
        """Restore a selection from its `state_dict`."""
        kept = {
            name: None if kept is None else torch.tensor(kept, dtype=torch.long) for name, kept in state["kept"].items()
        }
        narrowed = {
            name: Narrowed(tuple(producers), torch.tensor(units, dtype=torch.long))
            for name, (producers, units) in state.get("narrowed", {}).items()
        }
        return cls(kept, dict(state["drifts"]), frozenset(state["eight_bit"]), narrowed=narrowed)
