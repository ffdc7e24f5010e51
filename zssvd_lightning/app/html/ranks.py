"""Heat map of the ranks by block and kind of matrix, and the data of the layers that it shows on a click."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from zssvd_lightning.app.html.facts import Facts
from zssvd_lightning.app.html.markup import Markup, count, element, missing, paragraph, percent, section
from zssvd_lightning.compression.report import LayerReport
from zssvd_lightning.layers.storage import break_even_rank
from zssvd_lightning.model.targets import Place

MEASURES = {"highest": "of break-even rank", "full": "of full rank", "kept": "of parameters"}
"""Quantities that the colors can show, by name."""


ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"})
"""Characters that JSON within a script must not hold as they are."""


def ranks(facts: Facts, id_: str) -> Markup:
    """Return the section with a map of each stack of blocks, and the panel of the chosen layer."""
    layers = facts.report.layers
    if not layers:
        return section("Ranks", missing("target layers; the compression had none"), id_=id_)
    numbers = {name: index for index, name in enumerate(layers)}
    stacks: dict[str, dict[tuple[int | None, str], list[str]]] = {}
    for name in layers:
        stack, block, kind = Place.of(name)
        stacks.setdefault(stack, {}).setdefault((block, kind), []).append(name)
    maps = [_map(stack, cells, layers, numbers) for stack, cells in stacks.items()]
    about = paragraph(
        "A number is the rank of a layer, or the mean of several. Select a cell by click or with the arrow keys to see "
        "the spectrum of its layers. Layers without a color are dense; with a minus, they have fewer hidden units."
    )
    chosen = [element("option", f"share {title}", value=name) for name, title in MEASURES.items()]
    choose = element("label", "Color: ", element("select", *chosen, class_="measure"), class_="control")
    panel = element(
        "div",
        element("label", "Layer: ", element("select", class_="layer"), class_="control"),
        element("div", element("p", "The spectrum needs JavaScript."), class_="spectrum", aria_live="polite"),
        class_="panel",
    )
    data = element("script", Markup(_json(_data(facts))), type="application/json", class_="layers")
    scale = element("p", element("span", "0"), element("i", class_="scale"), element("span", "1"), class_="legend")
    content = element("div", element("div", choose, scale, *maps, class_="maps"), panel, class_="explorer")
    return section("Ranks", about, content, data, id_=id_)


def _map(
    stack: str,
    cells: Mapping[tuple[int | None, str], Sequence[str]],
    layers: Mapping[str, LayerReport],
    numbers: Mapping[str, int],
) -> Markup:
    """Return the map of a stack: a row for each block, a column for each kind."""
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    blocks = list(dict.fromkeys(block for block, _ in cells))
    head = [element("th", element("span", kind), scope="col") for kind in kinds]
    rows = []
    for block in blocks:
        row = [element("th", "" if block is None else str(block), scope="row")]
        row += [
            _cell([layers[n] for n in names], names, numbers) for names in (cells.get((block, k), ()) for k in kinds)
        ]
        rows.append(element("tr", *row))
    grid = element(
        "table",
        element("caption", stack or "outside of blocks"),
        element("thead", element("tr", element("th", "block"), *head)),
        element("tbody", *rows),
        class_="map",
        role="grid",
    )
    return element("div", grid, class_="wide")


def _cell(layers: Sequence[LayerReport], names: Sequence[str], numbers: Mapping[str, int]) -> Markup:
    if not layers:
        return element("td", class_="none")
    where = " ".join(str(numbers[name]) for name in names)
    hint = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    low_rank = [layer for layer in layers if layer.rank is not None]
    if not low_rank:
        shape = " by ".join(map(str, layers[0].shape))
        if (units := layers[0].units) is not None:
            title = f"{hint}: dense, {units[0]:,} of {units[1]:,} hidden units, {shape} before"
            return element("td", f"-{units[1] - units[0]}", class_="stays", data_layers=where, tabindex=-1, title=title)
        return element("td", "-", class_="stays", data_layers=where, tabindex=-1, title=f"{hint}: dense, {shape}")
    shares = [_shares(layer) for layer in low_rank]
    means = {name: sum(share[name] for share in shares) / len(shares) for name in MEASURES}
    rank = sum(layer.rank or 0 for layer in low_rank) / len(low_rank)
    told = ", ".join(f"{percent(means[name])} {title}" for name, title in MEASURES.items())
    style = ";".join(f"--{name}:{min(1.0, means[name]):.3f}" for name in MEASURES)
    hint = f"{hint}: rank {rank:.4g}, {told}"
    return element("td", f"{rank:.0f}", data_layers=where, tabindex=-1, style=style, title=hint)


def _shares(layer: LayerReport) -> dict[str, float]:
    m, n = layer.shape
    rank = layer.rank or 0
    return {"highest": rank / max(1, _highest(layer)), "full": rank / min(m, n), "kept": layer.kept / (m * n)}


def _highest(layer: LayerReport) -> int:
    """Return the break-even rank; that of plain factors for reports that do not have it."""
    return break_even_rank(*layer.shape) if layer.highest is None else layer.highest


def _data(facts: Facts) -> dict[str, Any]:
    """Return what the panel shows of each layer, in plain types."""
    trace = facts.report.trace or {"positions": {}, "spectra": {}}
    layers = [
        {
            "name": name,
            "shape": list(layer.shape),
            "rank": layer.rank,
            "highest": _highest(layer),
            "kept": percent(layer.kept / (layer.shape[0] * layer.shape[1])),
            "parameters": count(layer.kept),
            "bits": layer.in_8_bits,
            "spectrum": [value if math.isfinite(value) else None for value in trace["spectra"].get(name, ())],
        }
        for name, layer in facts.report.layers.items()
    ]
    return {"positions": trace["positions"], "layers": layers}


def _json(data: Any) -> str:
    """Return JSON that can stand in a script."""
    return json.dumps(data, separators=(",", ":")).translate(ESCAPES)
