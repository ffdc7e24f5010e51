"""The picture of a comparison. Needs matplotlib."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from zssvd_lightning._files import replacing_file

logger = logging.getLogger(__name__)


NARROWEST = 0.2
"""Of the fraction kept, that the axis shows at least, so that the points of one prune ratio stand at one place."""


HIGHEST = 100.0
"""Times the lowest perplexity of a panel's curves, that it shows at most: broken models leave room for the others."""


COLORS = 10
"""In matplotlib's cycle."""


MARKERS = "osD^v"
"""Each for as many curves as there are colors."""


class Curve(NamedTuple):
    """One preset on one text."""

    preset: str
    kept: list[float]
    """Fraction of the target parameters that stayed, by prune ratio."""
    perplexity: list[float]
    deviation: list[float]
    """Sample standard deviation over seeds."""
    dense: float | None
    """Perplexity of the dense model."""


def draw(panels: Mapping[str, Sequence[Curve]], path: Path) -> bool:
    """Draws perplexity against the fraction kept, a panel for each text; of curves too high for it the legend tells.

    Args:
        panels: curves by the title of their panel; nothing is drawn when there are none.
        path: picture to write; its ending says which kind.

    Returns:
        Whether there is a picture; without matplotlib a line is logged instead.

    Raises:
        OutputError: the picture cannot be written.
    """
    if not panels:
        return False
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullFormatter
    except ImportError:
        logger.warning("matplotlib is not installed, so there is no %s; pip install zssvd-lightning[report]", path.name)
        return False
    figure = Figure(figsize=(6 * len(panels) + 1.5, 4.5), layout="constrained")
    tops = {title: HIGHEST * min(min(curve.perplexity) for curve in curves) for title, curves in panels.items()}
    seen = {
        curve.preset for title, curves in panels.items() for curve in curves if min(curve.perplexity) <= tops[title]
    }
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for number, curve in enumerate(curves):
            label = curve.preset if curve.preset in seen else f"{curve.preset} (higher)"
            marker = MARKERS[number // COLORS % len(MARKERS)]
            axes.errorbar(
                curve.kept, curve.perplexity, curve.deviation, label=label, marker=marker, capsize=3, linewidth=1
            )
        if curves[0].dense is not None:
            axes.axhline(curves[0].dense, color="#303030", linestyle="--", linewidth=1, label="dense")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(top=min(tops[title], axes.get_ylim()[1]))
        axes.set_xlabel("fraction of the target parameters kept")
        axes.set_ylabel("perplexity")
        axes.set_title(title)
        left, right = axes.get_xlim()
        if (missing := NARROWEST - (right - left)) > 0:
            axes.set_xlim(left - missing / 2, right + missing / 2)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")  # the same in every panel
    with replacing_file(path) as file:
        figure.savefig(file, dpi=120)
    return True
