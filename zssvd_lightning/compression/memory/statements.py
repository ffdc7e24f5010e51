"""Statements on the memory and the disk of a compression, and refusals, before its first batch."""

import logging
import shutil
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

from zssvd_lightning.compression.engine import Compression
from zssvd_lightning.compression.memory.extent import Extent
from zssvd_lightning.compression.memory.needs import Formulas
from zssvd_lightning.distributed import Shards
from zssvd_lightning.errors import OutputError
from zssvd_lightning.offload.media import refuse_too_little
from zssvd_lightning.whitening.moments import statistics_bytes

logger = logging.getLogger(__name__)


def refuse_small_disk(compression: Compression, folder: Path | None = None) -> None:
    """Raise OutputError if `memory: blocks` needs more files than the disk has room for.

    Args:
        compression: the compression.
        folder: folder by which the run goes on if it is interrupted, whose files are replaced; None without one.
    """
    if not compression.config.by_blocks:
        return
    formulas = formulas_of(compression)
    refuse_too_little(formulas.disk)
    if folder is None:
        return
    there = next(path for path in (folder, *folder.parents) if path.exists())
    scratch = Path(tempfile.gettempdir())
    shared = formulas.disk if there.stat().st_dev == scratch.stat().st_dev else 0
    free = shutil.disk_usage(there).free + sum(path.stat().st_size for path in folder.glob("zssvd-*.pt"))
    if formulas.folder + shared > free:
        beside = f", beside {shared / 1e9:.2f} GB of scratch files in {scratch} on the same disk" if shared else ""
        raise OutputError(
            f"memory 'blocks' needs up to {formulas.folder / 1e9:.2f} GB in {folder}, to go on after an "
            f"interruption{beside}, where {free / 1e9:.2f} GB are free; the model is as it was. Name a folder on a "
            "disk with more space, or set the environment variable TMPDIR to one"
        )


def refuse_small_disk_of(compression: Compression, batches: int, stored: int) -> None:
    """Raise OutputError if the disk has no room for what is stored of all batches, given that of the first."""
    refuse_too_little(formulas_of(compression, stored * batches).disk - stored)


def formulas_of(compression: Compression, stored: int = 0) -> Formulas:
    """Return the formulas of `memory: blocks`, with `stored` bytes of hidden states, as if no layers share an input."""
    run = compression
    width = next(iter(run.targets.values())).weight.element_size()
    return Formulas(replace(Extent.of_layers(run.targets.shapes, width), stored=stored), run.config, run.budget)


def memory_of_statistics(compression: Compression) -> str:
    """Return a sentence on the memory that a compression takes: why its way was chosen, or that of its statistics.

    The latter is on each device, in this process. It is an upper bound: layers that read the same input share a second
    moment, but which do is known from the first batch on.
    """
    run, of = compression, Counter[str]()
    if run.choice_of_memory:
        return run.choice_of_memory
    for target in run.targets.values():
        of[str(target.weight.device)] += statistics_bytes(
            target.shape,
            target.module.weight.dtype,
            outputs=run.config.watches_outputs is not None,
            parts=run.team.size if isinstance(run.team, Shards) else 1,
            sets=2 if run.gathering.can_overflow else 1,
        )
    if run.config.by_blocks:
        formulas = formulas_of(run)
        later = formulas.kept_moments
        return f"scratch files take up to {formulas.disk / 2**30:.3g} GiB, and the hidden states of all batches" + (
            f"; {later / 2**30:.3g} GiB of them are statistics that corrections need" if later else ""
        )
    if run.config.place != "none":
        place = "host memory" if run.config.place == "cpu" else "scratch files"
        return f"statistics take up to {sum(of.values()) / 2**30:.3g} GiB of {place}"
    return "statistics take up to " + " and ".join(f"{size / 2**30:.3g} GiB on {place}" for place, size in of.items())


def announce(compression: Compression) -> None:
    """Log which share of the model will be compressed, and the memory that this takes."""
    coverage, removed = compression.coverage, compression.budget.of_parameters
    if compression.team.rank > 0:
        return
    logger.info(coverage.summary(removed))
    if (warning := coverage.warning(removed)) is not None:
        logger.warning(warning)
    logger.info(memory_of_statistics(compression))
