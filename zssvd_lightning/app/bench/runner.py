"""Measurement of several models in turns."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from tqdm.auto import tqdm

from zssvd_lightning.app.bench.memory import is_full
from zssvd_lightning.app.bench.models import Contender
from zssvd_lightning.app.bench.session import Abilities, Session, abilities_of
from zssvd_lightning.app.bench.settings import BenchSettings, Workload, workloads
from zssvd_lightning.app.bench.timing import turns
from zssvd_lightning.sources.models import longest_input

logger = logging.getLogger(__name__)


@dataclass
class Outcome:
    """Measurements of one model at one workload."""

    name: str
    work: Workload
    how: str = "eager"
    """How decode steps ran."""
    error: str | None = None
    """Reason why the model was not measured to the end; None if it was."""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """Seconds of every round by phase, in the order of the rounds."""
    flops: dict[str, int] = field(default_factory=dict)
    """Floating-point operations of a prefill, and of the first decode step, by phase."""
    bytes: dict[str, int] = field(default_factory=dict)
    """Bytes of weights and cache that a pass reads, by phase."""
    risen: int | None = None
    """Bytes of memory above the weights; None where the system does not tell."""


def measure(
    contenders: Sequence[Contender], settings: BenchSettings, *, progress: bool = True
) -> tuple[list[Outcome], list[str]]:
    """Measure all models at all workloads, in turns.

    Everything that can be refused is refused before the first workload. A model that runs out of memory at one is
    left out there, with the reason in its outcome.

    Args:
        contenders: models; the dense one comes first.
        settings: what to measure.
        progress: whether to draw a progress bar.

    Returns:
        One outcome for each workload and model, and notes for the reader.

    Raises:
        ModelSourceError: a model is of a kind that is not measured.
        ConfigError: a context is longer than the models take.
    """
    able = {each.name: abilities_of(each.model) for each in contenders}
    first = able[contenders[0].name]
    limits = [limit for each in contenders if (limit := longest_input(each.model)) is not None]
    decodes = any(each.no_decode is None for each in able.values())
    works, left_out = workloads(settings, min(limits, default=None), decodes=decodes, images=first.images)
    notes = [f"{left_out}: left out"] if left_out else []
    notes += list(dict.fromkeys(f"{each.no_decode}: prefill only" for each in able.values() if each.no_decode))
    if decodes and not first.static and torch.device(settings.device).type == "cuda":
        notes.append("the model runs on no static cache, so decode is eager, and bound by launches instead of bytes")
    for note in notes:
        logger.warning("%s", note)
    outcomes: list[Outcome] = []
    with tqdm(total=len(works) * len(contenders) * (settings.repeats + 1), disable=not progress, unit="run") as bar:

        def tell(name: str, work: Workload, what: str) -> None:
            bar.set_description(f"{name}, batch {work.batch}, context {work.context}, {what}")
            bar.update()

        for work in works:
            group = Group(contenders, able, work, settings, tell)
            with _recompiling() if settings.compiled else nullcontext():
                group.run()
            outcomes += group.outcomes.values()
    return outcomes, notes


class Group:
    """Turns of all models at one workload.

    Args:
        contenders: models.
        able: abilities of each model by name.
        work: what to run.
        settings: number of rounds, and how to run.
        tell: function that is called after each run with the name of the model, the work, and a word on the run.

    Attributes:
        outcomes: measurements by the name of the model.
    """

    def __init__(
        self,
        contenders: Sequence[Contender],
        able: Mapping[str, Abilities],
        work: Workload,
        settings: BenchSettings,
        tell: Callable[[str, Workload, str], None],
    ) -> None:
        self.outcomes = {each.name: Outcome(each.name, work) for each in contenders}
        self._work, self._settings, self._tell = work, settings, tell
        self._sessions = {
            each.name: Session(each.model, able[each.name], work, compiled=settings.compiled) for each in contenders
        }

    def run(self) -> None:
        """Warm up every model, then let them take turns."""
        for name in self.outcomes:
            self._warm_up(name)
            self._tell(name, self._work, "warm-up")
        start = time.perf_counter()
        for number, names in enumerate(turns(list(self.outcomes), self._settings.repeats), 1):
            for name in names:
                self._round(name)
                self._tell(name, self._work, f"round {number}")
            if self._settings.seconds is not None and time.perf_counter() - start > self._settings.seconds:
                break
        for session in self._sessions.values():
            session.close()

    def _warm_up(self, name: str) -> None:
        session, outcome = self._sessions[name], self.outcomes[name]
        outcome.how = session.how
        if (reason := session.too_large()) is not None:
            self._leave_out(name, reason)
            return
        with self._leaving_out(name):
            session.prepare()
            outcome.flops, outcome.bytes, outcome.risen = session.flops, session.bytes, session.risen

    def _round(self, name: str) -> None:
        if name not in self._sessions:
            return
        with self._leaving_out(name):
            for phase, seconds in self._sessions[name].round().items():
                self.outcomes[name].seconds.setdefault(phase, []).append(seconds)

    @contextmanager
    def _leaving_out(self, name: str) -> Iterator[None]:
        """Leave a model out of further rounds if it fails in the block."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            what = "out of memory" if is_full(error) else type(error).__name__
            self._leave_out(name, f"{what}: {next(iter(str(error).splitlines()), '')}")

    def _leave_out(self, name: str, reason: str) -> None:
        self.outcomes[name].error = reason
        logger.warning("%s at batch %d, context %d: %s", name, self._work.batch, self._work.context, reason)
        self._sessions.pop(name).close()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextmanager
def _recompiling() -> Iterator[None]:
    """Let torch compile the same code for every model, raise instead of running eagerly, and forget it afterward."""
    import torch._dynamo

    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=64):  # noqa: SLF001
        try:
            yield
        finally:
            torch.compiler.reset()
