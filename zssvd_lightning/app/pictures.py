"""Plots of the kept fraction of each layer and of the phases of a training run. Need matplotlib."""

import csv
import math
import re
from collections.abc import Collection, Mapping
from itertools import pairwise
from pathlib import Path

from zssvd_lightning._files import replacing_file
from zssvd_lightning._validation import needs_extra
from zssvd_lightning.app.html.facts import Facts
from zssvd_lightning.callbacks.loggers.figures import grid, show_grid
from zssvd_lightning.callbacks.trainer.telemetry import PREFIX, prefix_of
from zssvd_lightning.compression.phase import Phase
from zssvd_lightning.compression.report import Report
from zssvd_lightning.errors import TextError

COLORS = {"wait": "#dddddd", "calibrate": "#b9d7ea", "correct": "#f6d6ad", "recover": "#c9e4c5"}

PHASE = re.compile(r"zssvd(\d*)/phase")
"""Name of the metric of the phase; see `telemetry.prefix_of`."""


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
    """Draw the training loss of a run over its steps, with the phases of its compressions in the background.

    Phases of several compressions are numbered. A run that ended before a truncation is drawn as far as it came.

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

    columns = _read(metrics)
    losses = _logged(metrics, columns, loss)
    compressions = _compressions(columns) or [PREFIX]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    every = [_logged(metrics, columns, f"{prefix}phase") for prefix in compressions]
    last = max(step for logged in (losses, *every) for step, _ in logged) + 1
    for number, (prefix, logged) in enumerate(zip(compressions, every, strict=True), 1):
        phases = [logged[0], *(new for old, new in pairwise(logged) if new[1] != old[1])]
        for (start, index), (end, _) in zip(phases, [*phases[1:], (last, 0)], strict=True):
            name = list(Phase)[int(index)].value
            if end > start and name in COLORS and not (number > 1 and name == Phase.WAIT):
                axes.axvspan(start, end, color=COLORS[name], linewidth=0)
                title = f"{name} {number}" if len(compressions) > 1 and name != Phase.WAIT else name
                axes.text((start + end) / 2, 1.02, title, ha="center", transform=axes.get_xaxis_transform())
        pruned = f"{prefix}pruned"
        for step, _ in _logged(metrics, columns, pruned) if pruned in columns else []:
            axes.axvline(step, color="#b03030", linestyle="--", linewidth=1)
    axes.plot(*zip(*losses, strict=True), color="#303030", marker=".", linewidth=1)
    axes.set_xlim(0, last)
    axes.set_xlabel("step (dashed: truncation)")
    axes.set_ylabel("training loss (nats)")
    axes.set_title(plain(f"{loss} of {metrics}"), pad=24, fontsize="medium")
    with replacing_file(path) as file:
        figure.savefig(file, dpi=120)


def _read(metrics: str | Path) -> dict[str, list[tuple[str, str]]]:
    """Return the values of each column of a metrics.csv, without empty ones, each with its step."""
    found: dict[str, list[tuple[str, str]]] = {}
    try:
        with Path(metrics).open(encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for name in [name for name, value in row.items() if name and value]:
                    found.setdefault(name, []).append((row["step"], row[name]))
    except (OSError, KeyError, ValueError) as error:
        raise TextError(f"{metrics} is no metrics.csv of a CSVLogger: {error!r}") from error
    return found


def _logged(metrics: str | Path, columns: Mapping[str, list[tuple[str, str]]], name: str) -> list[tuple[int, float]]:
    """Return the values of a column with their steps. Raises TextError if there are none, or no numbers."""
    if name not in columns:
        raise TextError(
            f"{metrics} has no value of {name!r}; log with CSVLogger, and self.log the training loss (--loss names its "
            f"column). It has values of {', '.join(columns) or 'nothing'}"
        )
    try:
        return [(int(step), float(value)) for step, value in columns[name]]
    except ValueError as error:
        raise TextError(f"{metrics} is no metrics.csv of a CSVLogger: {name!r} holds no numbers: {error}") from error


def _compressions(columns: Collection[str]) -> list[str]:
    """Return the starts of the names of the metrics of each compression, in the order of the compressions."""
    numbers = sorted(int(found[1] or 1) for name in columns if (found := PHASE.fullmatch(name)))
    return [prefix_of(number) for number in numbers]


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
