"""One bar over all steps of a run, with the time that is left."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from tqdm.auto import tqdm

from zssvd_lightning._resources import Advance

BAR = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}"


class WholeBar:
    """Bar over all steps of a run. Its `step` is a `Display`.

    Args:
        shares: share of the time that each step takes, by its title. A step that runs more than once has a share each
            time. Steps without a share are shown, but do not move the bar.

    Example:
        >>> with WholeBar({"calibrate": 0.3, "spectra": 0.7}) as bar, shown_by(bar.step):  # doctest: +SKIP
        ...     report = compress(model, batches)
    """

    def __init__(self, shares: Mapping[str, float]) -> None:
        self._shares = shares
        self._bar: tqdm | None = None  # type: ignore[type-arg]

    def __enter__(self) -> Self:
        self._bar = tqdm(total=1.0, bar_format=BAR, smoothing=0, dynamic_ncols=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            if kind is None:
                self._bar.update(max(0.0, 1.0 - self._bar.n))
            self._bar.close()
        self._bar = None

    @contextmanager
    def step(self, title: str, total: int | None, unit: str) -> Iterator[Advance]:
        """Show a step; see `Display`. If it ends early, the bar moves on by its whole share."""
        bar, share = self._bar, self._shares.get(title, 0.0)
        if bar is None:
            raise RuntimeError("steps are shown within the context of the bar")
        before = bar.desc.removesuffix(": ")
        bar.set_description(title)
        done, moved = 0, 0.0

        def move(part: float) -> None:
            nonlocal moved
            bar.update(min(share * part - moved, 1.0 - bar.n))
            moved = share * part

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if total:
                move(min(1.0, done / total))

        yield advance
        move(1.0)
        bar.set_description(before)  # of the step around this one
