"""Layers of a report by stack, block and kind of matrix, and sums over them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from zssvd_lightning.compression.report import LayerReport, Report
from zssvd_lightning.model.targets import Place

ROWS = 24
"""Number of kinds of matrices in a table, beyond which the smallest are one row."""


@dataclass
class Sum:
    """Sum over layers."""

    layers: int = 0
    low_rank: int = 0
    dense: int = 0
    """Parameters if the layers were dense."""
    kept: int = 0
    """Parameters after compression."""
    flops: int | None = 0
    """Floating-point operations per token after compression; None if not known of a layer."""

    @property
    def dense_flops(self) -> int:
        """Floating-point operations per token if the layers were dense."""
        return 2 * self.dense

    def add(self, layer: LayerReport) -> None:
        """Add a layer."""
        m, n = layer.shape
        self.layers += 1
        self.low_rank += layer.rank is not None
        self.dense += m * n
        self.kept += layer.kept
        self.flops = None if self.flops is None or layer.flops is None else self.flops + layer.flops


def by_kind(layers: Mapping[str, LayerReport]) -> dict[str, Sum]:
    """Return the sums over each kind of matrix in each stack, in the order of the model, with the smallest as one."""
    places = {name: Place.of(name) for name in layers}
    several = len({place.stack for place in places.values()}) > 1
    sums: dict[str, Sum] = {}
    for name, layer in layers.items():
        place = places[name]
        sums.setdefault(_title(place, several), Sum()).add(layer)
    if len(sums) <= ROWS:
        return sums
    shown = set(sorted(sums, key=lambda title: -sums[title].dense)[: ROWS - 1])
    others = [name for name, place in places.items() if _title(place, several) not in shown]
    return {title: sums[title] for title in sums if title in shown} | {
        f"{len(sums) - len(shown)} smaller kinds": total(layers[name] for name in others)
    }


def _title(place: Place, several: bool) -> str:
    return f"{place.stack}: {place.kind}" if several and place.stack else place.kind


def total(layers: Iterable[LayerReport]) -> Sum:
    """Return the sum over layers."""
    found = Sum()
    for layer in layers:
        found.add(layer)
    return found


def bytes_of_a_parameter(report: Report) -> tuple[float, float] | None:
    """Return the bytes on disk of a dense parameter and of one that remains; None if not known.

    They differ for storage in 8 bits, where two parameters count as one, of 2 bytes.
    """
    files = report.file_bytes
    if not files or "expected" not in files or not report.model_parameters_before or not report.parameters_after:
        return None
    dense = files["dense"] / report.model_parameters_before
    others = report.model_parameters_before - report.parameters_before
    return dense, (files["expected"] - others * dense) / report.parameters_after
