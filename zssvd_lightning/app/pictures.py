"""Plots of the kept fraction of each layer and of the phases of a training run. Need matplotlib."""

import csv
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

from zssvd_lightning._files import replacing_file
from zssvd_lightning._validation import needs_extra
from zssvd_lightning.app.html.facts import Facts
from zssvd_lightning.callbacks.loggers.figures import grid, show_grid
from zssvd_lightning.compression.phase import Phase
from zssvd_lightning.compression.report import Report
from zssvd_lightning.errors import TextError

COLORS = {"wait": "#dddddd", "calibrate": "#b9d7ea", "correct": "#f6d6ad", "recover": "#c9e4c5"}


def draw(report: Report, path: str | Path) -> None:
    """Draw the kept fraction of every target layer by block and kind, the seconds of each step and a headline.

    The headline gives the share of target parameters removed and, if it was measured, the perplexity.

    Args:
        report: report of the compression.
        path: image file to write, such as a PNG.

    Raises:
        MissingExtraError: matplotlib is not installed; `pip install 'zssvd-lightning[report]'`.
    """
    with needs_extra("report", "pictures"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 1))
    shown = grid(report.layers, lambda layer: layer.kept / math.prod(layer.shape))
    image = show_grid(left, shown, cmap="viridis", vmin=0, vmax=1)
    left.set_title("fraction of each layer's parameters kept (1 = left dense)")
    figure.colorbar(image, ax=left, shrink=0.8)

    steps = list(report.seconds)
    right.barh(steps, [report.seconds[step] for step in steps])
    right.invert_yaxis()
    right.set_xlabel("seconds")
    right.set_title("time by step")
    figure.suptitle(_headline(report))
    figure.savefig(path, dpi=120)


def draw_phases(metrics: str | Path, path: str | Path, loss: str = "loss") -> None:
    """Draw the training loss of a run over its steps, with the phases of the compression in the background.

    Args:
        metrics: the `metrics.csv` of a `CSVLogger`, which the title names.
        path: file to write; its extension selects the format (`.png`, `.svg`, `.pdf`).
        loss: name of the column with the training loss.

    Raises:
        OutputError: the file cannot be written.
        TextError: the metrics cannot be read, or lack the loss or the phases that a `ZSSVDCallback` logs.
        MissingExtraError: matplotlib is not installed; `pip install 'zssvd-lightning[report]'`.
    """
    with needs_extra("report", "pictures"):
        from matplotlib.figure import Figure

    losses, logged = _column(metrics, loss), _column(metrics, "zssvd/phase")
    phases = [logged[0], *(new for old, new in pairwise(logged) if new[1] != old[1])]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    last = max(step for step, _ in losses) + 1
    for (start, number), (end, _) in zip(phases, [*phases[1:], (last, 0)], strict=True):
        name = list(Phase)[int(number)].value
        if end > start and name in COLORS:
            axes.axvspan(start, end, color=COLORS[name], linewidth=0)
            axes.text((start + end) / 2, 1.02, name, ha="center", transform=axes.get_xaxis_transform())
    for step, _ in _column(metrics, "zssvd/pruned"):
        axes.axvline(step, color="#b03030", linestyle="--", linewidth=1)
    axes.plot(*zip(*losses, strict=True), color="#303030", marker=".", linewidth=1)
    axes.set_xlim(0, last)
    axes.set_xlabel("step (dashed: truncation)")
    axes.set_ylabel("training loss (nats)")
    axes.set_title(plain(f"{loss} of {metrics}"), pad=24, fontsize="medium")
    with replacing_file(path) as file:
        figure.savefig(file, dpi=120)


def _column(metrics: str | Path, name: str) -> list[tuple[int, float]]:
    try:
        with Path(metrics).open(encoding="utf-8") as file:
            rows: list[dict[str, Any]] = list(csv.DictReader(file))
        found = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
    except (OSError, KeyError, ValueError) as error:
        raise TextError(
            f"{metrics} is no metrics.csv of a run with {name!r} in it: {error!r}; log with CSVLogger, and self.log "
            "the training loss"
        ) from error
    if not found:
        raise TextError(f"{metrics} has no value of {name!r}")
    return found


def _headline(report: Report) -> str:
    facts = Facts(report, "")
    parts = [facts.model] if facts.model else []
    parts.append(f"{report.removed:.1%} of {report.parameters_counted:,} target parameters removed")
    if report.perplexities:
        text = f" on {facts.text()}" if facts.text() else ""
        parts.append("perplexity{} {:.1f} → {:.1f}".format(text, *report.perplexities))
    return plain(", ".join(parts))


def plain(text: str) -> str:
    """Return a text that matplotlib does not take for mathematics."""
    return text.replace("$", r"\$")
