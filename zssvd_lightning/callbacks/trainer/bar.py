"""The progress bar of a Trainer, which also shows the compression and its steps between two batches."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import lightning as L
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar

from zssvd_lightning._contexts import overridden
from zssvd_lightning._resources import Advance, current_display, nothing, shown_by, tqdm_bar

EVERY = 0.1
"""Seconds between two drawings, at least."""


@contextmanager
def shown_on_bar(trainer: L.Trainer, entry: Callable[[], tuple[str, str]]) -> Iterator[None]:
    """Show a title and text on a progress bar of any kind within the context, and long steps in place of the text.

    A Trainer without a progress bar shows no steps either, unless a display is set around the fit.
    """
    bar = trainer.progress_bar_callback
    with ExitStack() as stack:
        if bar is not None:
            shown = _OnBar(trainer, bar, entry)
            get_metrics = bar.get_metrics
            stack.enter_context(
                overridden(bar, get_metrics=lambda *args, **kw: {**get_metrics(*args, **kw), **shown.entry})
            )
            stack.enter_context(shown_by(shown.step))
        elif current_display() is tqdm_bar:
            stack.enter_context(shown_by(nothing))
        yield


class _OnBar:
    """Display of steps on the progress bar of a Trainer.

    Args:
        trainer: the Trainer.
        bar: its progress bar.
        entry: function that returns the title, and the text that is shown while no step runs.
    """

    def __init__(self, trainer: L.Trainer, bar: ProgressBar, entry: Callable[[], tuple[str, str]]) -> None:
        self._trainer, self._bar, self._entry = trainer, bar, entry
        self._steps: list[str] = []
        self._drawn = -math.inf

    @property
    def entry(self) -> dict[str, str]:
        """Title of the compression, with the progress of the innermost step that runs, or its text."""
        title, text = self._entry()
        return {title: self._steps[-1] if self._steps else text}

    @contextmanager
    def step(self, title: str, total: int | None, unit: str) -> Iterator[Advance]:
        """Show a step; see `Display`."""
        done, of = 0, "" if total is None else f"/{total}"
        self._steps.append(f"{title} 0{of}")

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self._steps[-1] = f"{title} {done}{of}"
            self._draw()

        try:
            yield advance
        finally:
            self._steps.pop()

    def _draw(self) -> None:
        """Draw a bar of Lightning again, unless it was just drawn. Other kinds show the text with the next batch."""
        if time.monotonic() < self._drawn + EVERY:
            return
        self._drawn = time.monotonic()
        bar, module = self._bar, self._trainer.lightning_module
        if isinstance(bar, TQDMProgressBar) and bar._train_progress_bar is not None:  # noqa: SLF001
            bar.train_progress_bar.set_postfix(bar.get_metrics(self._trainer, module))
        elif isinstance(bar, RichProgressBar) and bar.train_progress_bar_id is not None:
            bar._update_metrics(self._trainer, module)  # noqa: SLF001
            bar.refresh()
