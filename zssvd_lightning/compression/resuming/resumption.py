"""Resumption of an interrupted run block by block.

The folder of a run holds the state after its last finished stage, and the finished blocks of the stage after it. A run
that goes on takes up the former, runs the forward passes of the present stage again, takes up the blocks, and continues
with the next one. Batches of finished stages are read again, so that loaders give the next ones, but not run. Random
number generators go on from where they were.
"""

import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from copy import deepcopy
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from lightning.fabric.utilities import move_data_to_device

from zssvd_lightning._contexts import random_states, set_random_states
from zssvd_lightning._files import checked_path
from zssvd_lightning._types import of_type
from zssvd_lightning.calibration.batches import Span, checked
from zssvd_lightning.compression.course import Stage
from zssvd_lightning.compression.engine import Compression
from zssvd_lightning.compression.gathering import BatchReading, kept_back
from zssvd_lightning.compression.resuming.batch_digest import add_batch
from zssvd_lightning.compression.resuming.fingerprint import fingerprint_of
from zssvd_lightning.compression.snapshot import state_of, take_up
from zssvd_lightning.config.compression import CompressionConfig
from zssvd_lightning.errors import CalibrationError, ContradictionError, OutputError
from zssvd_lightning.offload.media import read_on_host
from zssvd_lightning.serialization.unfinished import PROGRESS, UnfinishedFolder
from zssvd_lightning.sweep.finished import PASSES, Findings, FinishedParts

logger = logging.getLogger(__name__)

STATE, STAGES, DENSE = "state", "stages", "dense loss"
"""Names in the folder: the state after the last finished stage, the batches of all finished ones, and the loss of the
dense model on the batches kept back, as text."""


class _Finished(NamedTuple):
    """Batches of a finished stage."""

    span: Span
    digest: str
    keeps: bool
    """True if batches were kept back from them."""


class Resumption:
    """Progress of a run in its folder.

    Args:
        run: the compression, before its first stage.
        folder: the folder.
        calibration_batches: as for `compress`.
        reading: functions that read a batch.

    Raises:
        OutputError: the folder holds another run.
    """

    def __init__(
        self, run: Compression, folder: UnfinishedFolder, calibration_batches: int | None, reading: BatchReading
    ) -> None:
        folder.begin(fingerprint_of(run, calibration_batches))
        self._run, self._folder, self._reading = run, folder, reading
        self._finished = [_Finished(Span(*span), *others) for span, *others in folder.facts.get(STAGES, [])]
        self._present: tuple[Span, bool] | None = None
        self._digest, self._parts = sha256(), FinishedParts(folder, None)
        self._begins: list[dict[str, Any]] = []
        self._unknown: set[str] = set()

    def remaining(self, stages: Sequence[Stage], batches: Iterable[Any]) -> Sequence[Stage]:
        """Take up the state after the last finished stage, and return the stages that remain.

        Args:
            stages: all stages of the run.
            batches: its batches, of which those of finished stages are read.

        Raises:
            CalibrationError: the batches, or the functions that read them, are not those of the interrupted run.
        """
        done = len(self._finished)
        if self._folder.run is not None:
            count = self._parts.count
            of_next = f"; of the next, {count} blocks or regions are, and its forward passes run again" if count else ""
            logger.info(
                "the interrupted run in %s goes on: %d of %d stages are finished%s",
                self._folder.path,
                done,
                len(stages),
                of_next,
            )
        if done:
            state = dict(self._folder.load(STATE))
            self._begins = deepcopy(state.pop("begins"))  # which keeps nothing of the file
            for number, stage in enumerate(self._finished):
                self._read_again(number, stage, batches)
                if number == 0:
                    self._refuse_other_loss()
            set_random_states(state.pop("random"))
            self._take_up(state, done == len(stages))
        return stages[done:]

    def noting(self, batches: Iterable[Any], span: Span, *, keeps: bool) -> Iterator[Any]:
        """Yield the batches of the present stage, and note what they are."""
        self._present, self._digest = (span, keeps), sha256()
        for number, batch in enumerate(batches, 1):
            self._note(self._digest, batch, number)
            yield batch

    def parts(self, findings: Findings | None) -> FinishedParts:
        """Return the finished parts of the present stage."""
        self._parts = FinishedParts(self._folder, findings)
        return self._parts

    def finish_stage(self) -> None:
        """Keep the state after the present stage instead of its parts.

        Raises:
            OutputError: the folder cannot be written, as on a full disk.
        """
        run, folder = self._run, self._folder
        if self._present is None:
            raise RuntimeError("a stage is finished before its batches are read")
        self._finished.append(_Finished(self._present[0], self._digest.hexdigest(), self._present[1]))
        with read_on_host():
            state = state_of(run, statistics=False, weights=False)
        changed = {name: run.targets[name].weight.detach() for name in run.originals.copies}
        state["weights"] = changed if run.originals else None
        if (found := state["found"]) is not None:
            state["found"] = {name: found[name] for name in run.targets if name in found}
        if (guard := state["safeguard"]) is not None:
            guard["batches"] = []  # they are read again
        state["widths"] = run.gathering.free_widths.progress()
        self._begins.append(self._parts.begins)
        state["begins"], state["random"] = self._begins, random_states()
        facts: dict[str, Any] = {STAGES: [[list(each.span), each.digest, each.keeps] for each in self._finished]}
        if len(self._finished) == 1:
            facts[DENSE] = self._dense_loss(known=True)
        folder.commit({STATE: state}, facts=facts, drop=[*folder.entries, PASSES])

    def _note(self, digest: Any, batch: Any, number: int) -> None:
        """Add a batch, its mask and its number of terms to a digest. Warn once of what cannot be compared."""
        self._reading.refuse(self._run.model, batch, number)
        found = add_batch(digest, batch) - self._unknown
        if found:
            logger.warning(
                "a run that goes on cannot tell whether the batches are the same where they hold %s, without tensors, "
                "arrays, text or numbers; give the same batches in the same order",
                ", ".join(sorted(found)),
            )
            self._unknown |= found
        moved = move_data_to_device(batch, next(self._run.model.parameters()).device)
        add_batch(digest, [self._reading.mask(moved), float(self._reading.terms(moved))])

    def _read_again(self, number: int, stage: _Finished, batches: Iterable[Any]) -> None:
        run = self._run
        set_random_states(self._begins[number])
        wanted = checked(batches, stage.span, "finished", progress=False)
        if stage.keeps and run.safeguard is not None:
            wanted = kept_back(wanted, run.safeguard)
        found = sha256()
        for index, batch in enumerate(wanted, 1):
            self._note(found, batch, index)
        if found.hexdigest() != stage.digest:
            raise CalibrationError(
                f"stage {number + 1} of the interrupted run, whose results are in {self._folder.path}, had other "
                "batches, or the mask or terms give others of them; give the same in the same order and the same "
                "functions, or delete that folder to begin again"
            )

    def _dense_loss(self, *, known: bool = False) -> str | None:
        """Return the loss of the dense model on the batches kept back; None if it cannot be measured.

        The model is dense, or the loss is `known` from when it was.
        """
        guard = self._run.safeguard
        if guard is None:
            return None
        loss = guard.dense if known and guard.dense is not None else guard.mean_loss(self._run)
        return None if loss is None else repr(loss)

    def _refuse_other_loss(self) -> None:
        """Raise CalibrationError if the loss is not that of the interrupted run, while the model is dense."""
        if (before := self._folder.facts[DENSE]) is None:
            logger.warning("the loss cannot be measured again, so that it is not known to be the same as before")
        elif (now := self._dense_loss()) != before:
            raise CalibrationError(
                f"the loss, mask or terms give other losses than in the interrupted run whose results are in "
                f"{self._folder.path}: {now} and not {before} nats on the batches kept back; give the same functions, "
                "or delete that folder to begin again"
            )

    def _take_up(self, state: dict[str, Any], complete: bool) -> None:
        run = self._run
        run.leave_dense(state.pop("left_dense"))  # which have no original weights
        weights, widths = state.pop("weights"), state.pop("widths")
        if state["safeguard"] is not None and run.safeguard is not None:
            state["safeguard"]["batches"] = [list(run.safeguard.batches)]
        take_up(run, state)
        run.gathering.free_widths.take_up(widths)
        if weights is not None:
            run.originals.keep(weights)
            for name, W in weights.items():
                run.targets[name].assign(W)
        if complete and run.safeguard is not None:
            run.safeguard.compares(run)  # measures the present and the best state, for `settle`


def checked_place(
    where: str | Path | UnfinishedFolder | None, config: CompressionConfig
) -> Path | UnfinishedFolder | None:
    """Return the absolute path, or the open folder, that `resume_in` names.

    Raises:
        ConfigError: it is of another type.
        OutputError: no folder can have this path.
        ContradictionError: the run is not block by block.
    """
    if where is not None and not isinstance(where, UnfinishedFolder):
        where = checked_path(of_type(Path | None, where, "resume_in"), OutputError, "resume_in").absolute()
    if where is not None and not config.may_be_by_blocks:
        raise ContradictionError(
            "resume_in keeps the finished blocks of memory 'blocks', so that memory cannot be "
            f"{config.memory!r}; set it to 'blocks', or leave resume_in out"
        )
    return where


def folder_of(where: Path | UnfinishedFolder | None) -> Path | None:
    """Return the path of a folder, which may be open."""
    return where.path if isinstance(where, UnfinishedFolder) else where


def held_by(where: Path | UnfinishedFolder | None) -> int:
    """Return the bytes that a folder takes on the disk of the scratch files."""
    folder = folder_of(where)
    with suppress(OSError):
        if folder is not None and folder.stat().st_dev == Path(tempfile.gettempdir()).stat().st_dev:
            return sum(path.stat().st_size for path in folder.glob("zssvd-*.pt"))
    return 0


def refuse_other_run(run: Compression, where: Path | UnfinishedFolder | None, calibration_batches: int | None) -> None:
    """Raise the OutputErrors of `resumable`. Nothing in the folder changes."""
    if where is not None and run.config.by_blocks:
        with _opened(where) as folder:
            folder.refuse_other(fingerprint_of(run, calibration_batches))


@contextmanager
def resumable(
    run: Compression,
    where: Path | UnfinishedFolder | None,
    calibration_batches: int | None,
    reading: BatchReading,
) -> Iterator[Resumption | None]:
    """Yield the progress of a run in a folder; None without a folder, or if limits have chosen another way than blocks.

    A folder that is given as a path is removed if the block succeeds.

    Raises:
        OutputError: the folder cannot be used; see `UnfinishedFolder`.
    """
    if where is None or not run.config.by_blocks:
        if where is not None:
            _say_unused(where)
        yield None
    else:
        with _opened(where) as folder:
            yield Resumption(run, folder, calibration_batches, reading)


def _opened(where: Path | UnfinishedFolder) -> AbstractContextManager[UnfinishedFolder]:
    return nullcontext(where) if isinstance(where, UnfinishedFolder) else UnfinishedFolder(where)


def _say_unused(where: Path | UnfinishedFolder) -> None:
    folder = where.path if isinstance(where, UnfinishedFolder) else where
    logger.info("nothing is kept for an interruption: the limits of memory have chosen another way than 'blocks'")
    if (folder / PROGRESS).exists():
        logger.warning("what is finished in %s is not used; delete it", folder)
