"""Resumption of an interrupted run block by block.

The folder of a run holds the state after its last finished stage, and the finished blocks of the stage after it. A run
that goes on takes up the former, runs the forward passes of the present stage again, takes up the blocks, and continues
with the next one. Batches of finished stages are read again, so that loaders give the next ones, but not run.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from zssvd_lightning.calibration.batches import Span, checked, tensors_in
from zssvd_lightning.compression.course import Stage
from zssvd_lightning.compression.engine import Compression
from zssvd_lightning.compression.gathering import kept_back
from zssvd_lightning.compression.resuming.fingerprint import fingerprint_of
from zssvd_lightning.compression.snapshot import state_of, take_up
from zssvd_lightning.errors import CalibrationError, ContradictionError
from zssvd_lightning.offload.media import read_on_host
from zssvd_lightning.serialization.integrity import add_to_digest
from zssvd_lightning.serialization.unfinished import UnfinishedFolder
from zssvd_lightning.sweep.finished import GRADIENTS, PASSES, Findings, FinishedParts

logger = logging.getLogger(__name__)

STATE, STAGES = "state", "stages"
"""Names in the folder: the state after the last finished stage, and the batches of all finished ones."""


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

    Raises:
        OutputError: the folder holds another run.
    """

    def __init__(self, run: Compression, folder: UnfinishedFolder, calibration_batches: int | None) -> None:
        folder.refuse_other(fingerprint_of(run, calibration_batches))
        self._run, self._folder = run, folder
        self._finished = [_Finished(Span(*span), *others) for span, *others in folder.facts.get(STAGES, [])]
        self._present: tuple[Span, bool] | None = None
        self._digest = sha256()

    def remaining(self, stages: Sequence[Stage], batches: Iterable[Any]) -> Sequence[Stage]:
        """Take up the state after the last finished stage, and return the stages that remain.

        Args:
            stages: all stages of the run.
            batches: its batches, of which those of finished stages are read.

        Raises:
            CalibrationError: the batches are not those of the interrupted run.
        """
        done = len(self._finished)
        if self._folder.run is not None:
            count = FinishedParts(self._folder, None).count
            of_next = f"; of the next, {count} blocks or regions are, and its forward passes run again" if count else ""
            logger.info(
                "the interrupted run in %s goes on: %d of %d stages are finished%s",
                self._folder.path,
                done,
                len(stages),
                of_next,
            )
        for number, stage in enumerate(self._finished):
            self._read_again(number, stage, batches)
        if done:
            self._take_up(done == len(stages))
        return stages[done:]

    def noting(self, batches: Iterable[Any], span: Span, *, keeps: bool) -> Iterator[Any]:
        """Yield the batches of the present stage, and note what they are."""
        self._present, self._digest = (span, keeps), sha256()
        for batch in batches:
            _add_batch(self._digest, batch)
            yield batch

    def parts(self, findings: Findings | None) -> FinishedParts:
        """Return the finished parts of the present stage."""
        return FinishedParts(self._folder, findings)

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
        facts = {STAGES: [[list(each.span), each.digest, each.keeps] for each in self._finished]}
        folder.commit({STATE: state}, facts=facts, drop=[*folder.entries, PASSES, GRADIENTS])

    def _read_again(self, number: int, stage: _Finished, batches: Iterable[Any]) -> None:
        run = self._run
        wanted = checked(batches, stage.span, "finished", progress=False)
        if stage.keeps and run.safeguard is not None:
            wanted = kept_back(wanted, run.safeguard)
        found = sha256()
        for batch in wanted:
            _add_batch(found, batch)
        if found.hexdigest() != stage.digest:
            raise CalibrationError(
                f"stage {number + 1} of the interrupted run, whose results are in {self._folder.path}, had other "
                "batches; give the same in the same order, or delete that folder to begin again"
            )

    def _take_up(self, complete: bool) -> None:
        run, state = self._run, dict(self._folder.load(STATE))
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


@contextmanager
def resumable(
    run: Compression, where: str | Path | UnfinishedFolder | None, calibration_batches: int | None
) -> Iterator[Resumption | None]:
    """Yield the progress of a run in a folder; None without a folder, or if limits have chosen another way than blocks.

    A folder that is given as a path is removed if the block succeeds.

    Raises:
        ContradictionError: the run is not block by block.
        OutputError: the folder cannot be used; see `UnfinishedFolder`.
    """
    if where is not None and not run.config.by_blocks and not run.config.limits:
        raise ContradictionError(
            "resume_in keeps the finished blocks of memory 'blocks', so that memory cannot be "
            f"{run.config.memory!r}; set it to 'blocks', or leave resume_in out"
        )
    if where is None or not run.config.by_blocks:
        if where is not None:
            logger.info("nothing is kept for an interruption: that takes memory 'blocks', which the limits do not need")
        yield None
    elif isinstance(where, UnfinishedFolder):
        yield Resumption(run, where, calibration_batches)
    else:
        with UnfinishedFolder(where) as folder:
            yield Resumption(run, folder, calibration_batches)


def _add_batch(digest: Any, batch: Any) -> None:
    for name, tensor in tensors_in(batch):
        digest.update(name.encode())
        add_to_digest(digest, tensor)
