"""Figures of matplotlib that show a truncation: map of the ranks, walk of the selection, histogram of sensitivities."""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from zssvd_lightning.compression.report import LayerReport, Report
from zssvd_lightning.layers.storage import break_even_rank
from zssvd_lightning.model.targets import Place

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DENSE = 2.0
"""Value of a layer that stays dense, which is above the scale of the map."""

WIDTH = 12
"""Largest number of columns with a label of their own."""


class Grid(NamedTuple):
    """Values of layers by kind of matrix and block."""

    kinds: list[str]
    """Title of each row."""
    blocks: list[str]
    """Title of each column."""
    values: list[list[float]]
    """Mean over the layers of each cell; NaN where there is no layer."""


def grid(layers: Mapping[str, LayerReport], value: Callable[[LayerReport], float]) -> Grid:
    """Return the mean value of the layers of each kind and block. Kinds of several stacks have the name of theirs."""
    places = {name: Place.of(name) for name in layers}
    several = len({place.stack for place in places.values() if place.block is not None}) > 1
    cells: dict[tuple[str, str], list[float]] = {}
    for name, place in places.items():
        kind = f"{place.stack}: {place.kind}" if several and place.stack else place.kind
        block = "" if place.block is None else str(place.block)
        cells.setdefault((kind, block), []).append(value(layers[name]))
    kinds, blocks = ([*dict.fromkeys(key[side] for key in cells)] for side in (0, 1))
    means = {key: sum(found) / len(found) for key, found in cells.items()}
    return Grid(kinds, blocks, [[means.get((kind, block), math.nan) for block in blocks] for kind in kinds])


def show_grid(axes: "Axes", shown: Grid, **options: Any) -> Any:
    """Draw a grid as an image with labeled rows and columns, and return the image.

    Args:
        axes: axes to draw on.
        shown: the grid.
        options: options of `imshow`.
    """
    image = axes.imshow(shown.values, aspect="auto", interpolation="nearest", **options)
    axes.set_yticks(range(len(shown.kinds)), shown.kinds)
    step = max(1, -(-len(shown.blocks) // WIDTH))
    axes.set_xticks(range(0, len(shown.blocks), step), shown.blocks[::step])
    axes.set_xlabel("block")
    return image


def figures(report: Report) -> "dict[str, Figure]":
    """Return the figures of the last truncation, by name; without those for which the report has no data.

    `rank_map`, `walk` and `sensitivities` show the same as the page of `zssvd report`. matplotlib must be installed.

    Args:
        report: report of a compression after a truncation.
    """
    found = {}
    if report.layers:
        found["rank_map"] = _rank_map(report.layers)
    trace = report.trace or {}
    if (walk := trace.get("walk")) and walk["removals"]:
        found["walk"] = _walk(walk)
    if counts := trace.get("sensitivities"):
        found["sensitivities"] = _sensitivities(counts)
    return found


def _new(width: float, height: float) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _rank_map(layers: Mapping[str, LayerReport]) -> "Figure":
    """Return a map of the ranks as shares of the break-even rank, by kind of matrix and block."""
    from matplotlib import colormaps

    shown = grid(layers, _share)
    figure, axes = _new(8, 1.5 + 0.3 * len(shown.kinds))
    colors = colormaps["viridis"].with_extremes(over="#c8c8c8")
    image = show_grid(axes, shown, cmap=colors, vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, extend="max", label="rank / break-even rank (gray: dense)")
    low_rank = sum(layer.rank is not None for layer in layers.values())
    axes.set_title(f"ranks: {low_rank} of {len(layers)} layers are low-rank")
    return figure


def _share(layer: LayerReport) -> float:
    """Return the share of the break-even rank, at most 1; `DENSE` if the layer stays dense."""
    if layer.rank is None:
        return DENSE
    return min(1.0, layer.rank / max(1, layer.highest or break_even_rank(*layer.shape)))


def _walk(walk: Mapping[str, Any]) -> "Figure":
    """Return the running sum of the sensitivities over the removals of the selection."""
    figure, axes = _new(7, 4)
    removals = [min((index + 0.5) * walk["stride"], walk["removals"]) for index in range(len(walk["lowest"]))]
    axes.axhline(0, color="#808080", linewidth=1)
    axes.fill_between(removals, walk["lowest"], walk["highest"], color="#3b6fb6", alpha=0.4)
    for side in ("lowest", "highest"):
        axes.plot(removals, walk[side], color="#3b6fb6", linewidth=1)
    axes.set_xlim(0, walk["removals"])
    axes.set_xlabel("components dropped so far")
    axes.set_ylabel("sum of sensitivities (nats)")
    axes.set_title(f"running sum: ends at {walk['total']:.3g}, sizes add up to {walk['length']:.3g} nats")
    return figure


def _sensitivities(found: Mapping[str, Any]) -> "Figure":
    """Return the histogram of the signed sensitivities, kept above dropped."""
    figure, axes = _new(7, 4)
    edges, bins = found["edges"], range(len(found["kept"]))
    places = [index + 0.5 for index in bins]
    axes.bar(places, found["dropped"], width=0.88, color="#c8553d", label="dropped")
    axes.bar(places, found["kept"], width=0.88, bottom=found["dropped"], color="#3b6fb6", label="kept")
    ticks = sorted({0, len(edges) - 1, *range(2, len(edges) // 2 - 1, 4), *range(len(edges) // 2 + 2, len(edges), 4)})
    axes.set_xticks(ticks, [f"{edges[index]:.0e}" for index in ticks], fontsize="small", rotation=30)
    axes.set_xlim(0, len(bins))
    axes.set_xlabel("predicted change of the loss by dropping a component (nats)")
    axes.set_ylabel("components")
    axes.legend()
    axes.set_title("sensitivities of all components")
    return figure
