"""Record of a compression for its report: spectra, sensitivities, walk of the selection, and loss of each state."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from zssvd_lightning.selection.components import Components, Selection

POINTS = 32
"""Singular values to record of each layer, if all layers together have no more than `TOTAL`."""


TOTAL = 20_000
"""Singular values to record of all layers together, unless this is less than `FEWEST` of each."""


FEWEST = 6
"""Singular values to record of each layer at least."""


DECADES, PER_DECADE = 6, 2
"""Range of the histogram below the largest sensitivity, on a logarithmic scale, and its bins in each factor of ten."""


@dataclass
class Trace:
    """Statistics and results of a compression, in plain types and of bounded size."""

    positions: dict[str, list[int]] = field(default_factory=dict)
    """Number of components of a layer -> numbers of the recorded ones, from 1."""
    spectra: dict[str, list[float]] = field(default_factory=dict)
    """Name -> singular values at these positions, of the weight before the first truncation in the coordinates of the
    metric. The number of components is the smaller side of the weight."""
    sensitivities: dict[str, list[float]] | None = None
    """Histogram of the signed sensitivities of all components: `edges` (b + 1,) in nats, and how many of each bin (b,)
    were `kept` and `dropped` by the first truncation to the whole prune ratio."""
    walk: dict[str, Any] | None = None
    """`Walk.to_dict` of that truncation; None if its rule chooses all ranks at once."""
    states: list[dict[str, Any]] = field(default_factory=list)
    """Every truncation and step in order: `kind` (`truncation`, `step` or `correction`), `loss` on the batches kept
    back (nats; None if not measured), `taken_back`, and the predicted change of the loss by dropping components
    (`first_order` and `second_order`, nats; None if not predicted)."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain types."""
        return asdict(self)

    @classmethod
    def of_dict(cls, saved: Mapping[str, Any] | None) -> Self:
        """Return the record that `to_dict` wrote; an empty one for None, as in checkpoints of earlier releases."""
        return cls(**(saved or {}))

    def truncated(self, components: Mapping[str, Components], selection: Selection, *, kind: str, exact: bool) -> None:
        """Add a truncation.

        Args:
            components: components of each layer before it.
            selection: the components that remain.
            kind: `truncation` if it is one of those to the prune ratio, `step` if a step went before it.
            exact: whether the second-order change is an estimate of the loss, as the metric says.
        """
        changes: dict[str, float | None] = {"first_order": None, "second_order": None}
        if kind == "truncation":
            changes["first_order"] = selection.first_order_sum
            changes["second_order"] = selection.dropped_second_order(components) if exact else None
            self.sensitivities = histogram(components, selection)
            self.walk = None if selection.walk is None else selection.walk.to_dict()
            if not self.spectra:
                self._add_spectra(components)
        self.states.append({"kind": kind, "loss": None, "taken_back": False, **changes})

    def measured(self, loss: float, *, taken_back: bool = False) -> None:
        """Add the loss (nats) of the present state, which is a new one if that of the last is known."""
        if not self.states or self.states[-1]["loss"] is not None:
            changes = {"first_order": None, "second_order": None}
            self.states.append({"kind": "correction", "loss": None, "taken_back": False, **changes})
        self.states[-1] |= {"loss": loss, "taken_back": taken_back}

    def _add_spectra(self, components: Mapping[str, Components]) -> None:
        points = max(FEWEST, min(POINTS, TOTAL // max(1, len(components))))
        for name, found in components.items():
            r = len(found.sigma)
            places = self.positions.setdefault(str(r), positions(r, points))
            self.spectra[name] = [float(f"{value:.4g}") for value in found.sigma[torch.tensor(places) - 1].tolist()]


def positions(r: int, points: int) -> list[int]:
    """Return at most `points` numbers from 1 to r, with more of them among the first, where spectra fall fast.

    Example:
        >>> positions(100, 5)
        [1, 7, 26, 57, 100]
    """
    if r <= points:
        return list(range(1, r + 1))
    return sorted({1 + round((r - 1) * (i / (points - 1)) ** 2) for i in range(points)})


def histogram(components: Mapping[str, Components], selection: Selection) -> dict[str, list[float]] | None:
    """Return how many signed sensitivities are kept and dropped in bins of a logarithmic scale; None if all are 0.

    The bin in the middle holds all that are smaller than the largest by `DECADES` factors of ten.
    """
    delta = torch.cat([found.delta.double().cpu() for found in components.values()])
    largest = float(delta.abs().max()) if len(delta) else 0.0
    if largest == 0:
        return None
    sizes = largest * 10.0 ** (-torch.arange(DECADES * PER_DECADE + 1, dtype=torch.float64) / PER_DECADE)
    edges = torch.cat([-sizes, sizes.flip(0)])
    bins = torch.bucketize(delta, edges).clamp(1, len(edges) - 1) - 1
    kept = torch.cat([_kept(selection.kept[name], len(found.delta)) for name, found in components.items()])
    counts = {
        key: torch.bincount(bins[part], minlength=len(edges) - 1) for key, part in (("kept", kept), ("dropped", ~kept))
    }
    return {"edges": [float(f"{edge:.4g}") for edge in edges.tolist()], **{k: n.tolist() for k, n in counts.items()}}


def _kept(indices: Tensor | None, r: int) -> Tensor:
    """Return a mask (r,) of the remaining components."""
    kept = torch.full((r,), indices is None)
    if indices is not None:
        kept[indices.cpu()] = True
    return kept
