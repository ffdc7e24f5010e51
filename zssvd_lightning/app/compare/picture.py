"""Plot of a comparison. Needs matplotlib."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from zssvd_lightning._files import replacing_file
from zssvd_lightning.app.pictures import plain

logger = logging.getLogger(__name__)


NARROWEST = 0.2
"""Minimum range of the x-axis in fraction kept, so that points of the same prune ratio appear at one place."""


HIGHEST = 100.0
"""Top of a panel as a multiple of its lowest perplexity, so that broken models do not squeeze the other curves."""


COLORS = 10
"""Number of colors in matplotlib's cycle."""


MARKERS = "osD^v"
"""Markers; each is used for `COLORS` curves in a row."""


class Curve(NamedTuple):
    """Curve of one preset on one text."""

    preset: str
    kept: list[float]
    """Fraction of the target parameters kept, for each prune ratio."""
    perplexity: list[float]
    deviation: list[float]
    """Sample standard deviation over seeds."""
    dense: float | None
    """Perplexity of the dense model."""


def draw(panels: Mapping[str, Sequence[Curve]], path: Path, title: str = "") -> bool:
    """Draw perplexity against the fraction kept, with one panel for each text.

    Presets whose curves are above the top of all panels are named under the title instead of in the legend.

    Args:
        panels: curves by panel title; nothing is drawn if there are none.
        path: file to write; its extension selects the format.
        title: title of the figure, such as the model and its texts.

    Returns:
        True if the plot was written. Without matplotlib, a warning is logged instead.

    Raises:
        OutputError: the file cannot be written.
    """
    if not panels:
        return False
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullFormatter
    except ImportError:
        logger.warning(
            "matplotlib is not installed, so there is no %s; pip install 'zssvd-lightning[report]'", path.name
        )
        return False
    figure = Figure(figsize=(6 * len(panels) + 1.5, 4.5), layout="constrained")
    tops = {panel: HIGHEST * min(min(curve.perplexity) for curve in curves) for panel, curves in panels.items()}
    seen = {
        curve.preset for panel, curves in panels.items() for curve in curves if min(curve.perplexity) <= tops[panel]
    }
    for axes, (panel, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for number, curve in enumerate(curves):
            if curve.preset not in seen:
                continue
            marker = MARKERS[number // COLORS % len(MARKERS)]
            errors, label = curve.deviation, curve.preset
            axes.errorbar(curve.kept, curve.perplexity, errors, label=label, marker=marker, capsize=3, linewidth=1)
        if curves[0].dense is not None:
            axes.axhline(curves[0].dense, color="#303030", linestyle="--", linewidth=1, label="dense")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(top=min(tops[panel], axes.get_ylim()[1]))
        axes.set_xlabel("fraction of the target parameters kept")
        axes.set_ylabel("perplexity")
        axes.set_title(panel)
        left, right = axes.get_xlim()
        if (missing := NARROWEST - (right - left)) > 0:
            axes.set_xlim(left - missing / 2, right + missing / 2)
    higher = dict.fromkeys(c.preset for curves in panels.values() for c in curves if c.preset not in seen)
    above = f"above the scale: {', '.join(higher)}" if higher else ""
    figure.suptitle(plain("\n".join(line for line in (title, above) if line)), fontsize="medium", wrap=True)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")  # identical in every panel
    with replacing_file(path) as file:
        figure.savefig(file, dpi=120)
    return True
