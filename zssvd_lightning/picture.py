"""The report as a picture: how much of each layer stayed, layer by layer, and what the run cost. Needs matplotlib."""

import re
from pathlib import Path

from zssvd_lightning.budget import stored_parameters
from zssvd_lightning.report import Report


def draw(report: Report, path: str | Path) -> None:
    """Writes a PNG: kept fraction of every target by block and kind, perplexity, parameters and seconds.

    Raises:
        ImportError: matplotlib is not installed; `pip install zssvd-lightning[report]`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 1))
    rows, columns, kept = _grid(report)
    image = left.imshow(kept, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    left.set_yticks(range(len(rows)), rows)
    left.set_xticks(range(0, len(columns), max(1, len(columns) // 15)), columns[:: max(1, len(columns) // 15)])
    left.set_xlabel("block")
    left.set_title("fraction of each layer's parameters kept (1 = left dense)")
    figure.colorbar(image, ax=left, shrink=0.8)

    steps = list(report.seconds)
    right.barh(steps, [report.seconds[step] for step in steps])
    right.invert_yaxis()
    right.set_xlabel("seconds")
    right.set_title("time by step")
    figure.suptitle(_headline(report))
    figure.savefig(path, dpi=120)


def _grid(report: Report) -> tuple[list[str], list[str], list[list[float]]]:
    """Rows are names without their numbers, columns the first number in the name; NaN where there is no layer."""
    cells: dict[tuple[str, str], float] = {}
    for name, (rank, (m, n)) in report.layers.items():
        number = re.search(r"\d+", name)
        kind = re.sub(r"^.*?\.\d+\.", "", name)
        stored = m * n if rank is None else stored_parameters(m, n, rank)
        cells[kind, number.group() if number else ""] = stored / (m * n)
    rows = list(dict.fromkeys(kind for kind, _ in cells))
    columns = list(dict.fromkeys(number for _, number in cells))
    return rows, columns, [[cells.get((row, column), float("nan")) for column in columns] for row in rows]


def _headline(report: Report) -> str:
    parts = [f"{report.reached:.1%} of {report.parameters_before:,} target parameters removed"]
    if report.perplexity:
        parts.append(f"perplexity {report.perplexity['dense']:.1f} → {report.perplexity['compressed']:.1f}")
    return ", ".join(parts)
