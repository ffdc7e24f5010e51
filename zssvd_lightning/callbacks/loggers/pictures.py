"""Pictures of each truncation for the loggers that take some: TensorBoard and Weights & Biases.

They have the names of metrics: `zssvd/rank_map`, `zssvd/walk` and `zssvd/sensitivities`.
"""

import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import lightning as L

from zssvd_lightning.callbacks.loggers.figures import figures
from zssvd_lightning.compression.report import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)


Show = Callable[[str, "Figure", int], object]
"""Function that sends a figure to a logger, given its name and the step."""


def log_pictures(trainer: L.Trainer, report: Report, prefix: str) -> None:
    """Send the pictures of a truncation to every logger that takes pictures, from the main process alone.

    Without matplotlib there are none, which is logged once.

    Args:
        trainer: the Trainer, whose `global_step` is the step of the pictures.
        report: report of the compression after the truncation.
        prefix: what the names of the pictures begin with.
    """
    if not trainer.is_global_zero:
        return
    takers = [show for each in trainer.loggers if (show := _shown_by(each)) is not None]
    if not takers:
        return
    if importlib.util.find_spec("matplotlib") is None:
        _tell_that_there_are_none()
        return
    try:
        for name, figure in figures(report).items():
            for show in takers:
                show(f"{prefix}{name}", figure, trainer.global_step)
    except Exception as error:  # noqa: BLE001  pictures are no reason to end a fit
        logger.warning("loggers get no pictures of this truncation: %s: %s", type(error).__name__, error)


def _shown_by(taker: Any) -> Show | None:
    """Return the function that sends a figure to a logger; None if it takes no pictures."""
    if callable(log_image := getattr(taker, "log_image", None)):  # as WandbLogger
        return lambda name, figure, step: log_image(key=name, images=[_pixels(figure)], step=step)
    add_figure = getattr(getattr(taker, "experiment", None), "add_figure", None)  # as TensorBoardLogger
    if callable(add_figure):
        return lambda name, figure, step: add_figure(name, figure, global_step=step, close=False)
    return None


def _pixels(figure: "Figure") -> "NDArray[Any]":
    """Return a figure as colors (height, width, 3) in 8 bits."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


@functools.cache
def _tell_that_there_are_none() -> None:
    logger.warning(
        "loggers get no pictures of ranks and selection, because matplotlib is not installed; "
        "pip install 'zssvd-lightning[report]'"
    )
