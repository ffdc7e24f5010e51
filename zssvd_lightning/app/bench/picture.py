"""Plot of a measurement: time over dense, with the limit of each model. Needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path

from zssvd_lightning._files import replacing_file
from zssvd_lightning._validation import needs_extra
from zssvd_lightning.app.bench.results import LIMIT, Row

WIDTH = 0.8
"""Width of all bars of one workload together."""


def check_drawing() -> None:
    """Raise MissingExtraError if matplotlib is not installed."""
    with needs_extra("report", "pictures"):
        import matplotlib.figure  # noqa: F401


def draw(rows: Sequence[Row], path: str | Path) -> None:
    """Draw time over dense as bars with quartiles, one panel for each phase, and the limit of each bar as a line.

    Args:
        rows: rows of the results. Those without a ratio to the dense model are left out.
        path: file to write; its extension selects the format.

    Raises:
        OutputError: the file cannot be written.
        MissingExtraError: matplotlib is not installed; `pip install 'zssvd-lightning[report]'`.
    """
    with needs_extra("report", "pictures"):
        from matplotlib.figure import Figure

    drawn = [row for row in rows if row.time_over_dense is not None and row.limit is not None]
    phases = list(dict.fromkeys(row.phase for row in drawn)) or ["nothing measured"]
    models = list(dict.fromkeys(row.model for row in drawn))
    figure = Figure(figsize=(6 * len(phases) + 1.5, 4.5), layout="constrained")
    for axes, phase in zip(figure.subplots(1, len(phases), squeeze=False)[0], phases, strict=True):
        works = list(dict.fromkeys((row.batch, row.context) for row in drawn if row.phase == phase))
        for number, model in enumerate(models):
            for row in (row for row in drawn if row.phase == phase and row.model == model):
                time, limit = row.time_over_dense, row.limit
                if time is None or limit is None:
                    continue
                width = WIDTH / len(models)
                x = works.index((row.batch, row.context)) + (number - (len(models) - 1) / 2) * width
                error = [[time.median - time.lower], [time.upper - time.median]]
                axes.bar(x, time.median, width, yerr=error, capsize=2, color=f"C{number % 10}", label=model)
                axes.hlines(limit, x - width / 2, x + width / 2, color="#303030", linewidth=2, label="limit")
        axes.set_xticks(range(len(works)), [f"batch {batch}\ncontext {context or 'image'}" for batch, context in works])
        axes.axhline(1, color="#909090", linestyle="--", linewidth=1)
        axes.set_ylabel("time over dense")
        axes.set_title(f"{phase} (limit: {LIMIT[phase]} over dense)" if phase in LIMIT else phase)
    every = [pair for axes in figure.axes for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    shown = {label: handle for handle, label in every}
    figure.legend(shown.values(), shown.keys(), loc="outside right center")
    with replacing_file(path) as file:
        figure.savefig(file, dpi=120)
