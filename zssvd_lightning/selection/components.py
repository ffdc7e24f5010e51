"""What a selection rule is given of a layer, and what it returns."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Components:
    """One matrix, as selection sees it."""

    sigma: Tensor
    """Singular values (r,), descending."""
    delta: Tensor
    """Predicted change of the loss (r,) when a component is dropped."""
    rounding: Tensor | None = None
    """Predicted change of the loss (r,) when a component is kept in 8 bits instead of 16."""
    rounding_dense: float | None = None
    """Predicted change of the loss when the dense weight is kept in 8 bits instead of 16."""
    curvature: Tensor | None = None
    """Of the loss along each component of unit size (r,), where it was estimated; 1 elsewhere."""

    @property
    def second_order(self) -> Tensor:
        """Second-order change of the loss (r,) when a component is dropped, `1/2 sigma^2` times the curvature."""
        loss = self.sigma.double().square() / 2
        return loss if self.curvature is None else loss * self.curvature.double()


@dataclass(frozen=True)
class Selection:
    """What stays."""

    kept: Mapping[str, Tensor | None]
    """Name -> ascending indices (k,) of the components that stay; None where the matrix stays dense."""
    drifts: Mapping[str, float]
    """Name -> sum of delta over what is dropped of it."""
    eight_bit: frozenset[str] = frozenset()
    """Names of the matrices to keep in 8 bits, where storage leaves that to be chosen."""

    @property
    def predicted_drift(self) -> float:
        """Sum of delta over everything dropped."""
        return sum(self.drifts.values())

    def rank(self, name: str) -> int | None:
        """How many components of `name` stay, or None where it stays dense."""
        kept = self.kept[name]
        return None if kept is None else len(kept)

    def state_dict(self) -> dict[str, Any]:
        """Plain types, from which `of_state` makes the same."""
        return {
            "kept": {name: None if kept is None else kept.tolist() for name, kept in self.kept.items()},
            "drifts": dict(self.drifts),
            "eight_bit": sorted(self.eight_bit),
        }

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Self:
        """From a `state_dict`."""
        kept = {name: None if kept is None else torch.tensor(kept) for name, kept in state["kept"].items()}
        return cls(kept, dict(state["drifts"]), frozenset(state["eight_bit"]))
