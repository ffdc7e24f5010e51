"""Floating-point operations of a compression, for `zssvd plan --memory`."""

from typing import NamedTuple

from zssvd_lightning.compression.course import course
from zssvd_lightning.compression.memory.needs import Formulas
from zssvd_lightning.compression.phase import Phase
from zssvd_lightning.decomposition.work_sharing import svd_work, whitening_work
from zssvd_lightning.whitening.output_gradients import OUTPUT_GRADIENTS


class Work(NamedTuple):
    """Floating-point operations of a compression."""

    passes: float
    """Forward and backward passes of all batches, with the sums of second moments."""
    decompositions: float
    """Square roots of second moments, and SVDs."""

    def hours(self, rate: float) -> float:
        """Return the hours at a rate in operations per second."""
        return sum(self) / rate / 3600


def work_of(formulas: Formulas, batches: int) -> Work:
    """Return the work of a compression.

    A backward pass counts as two forward passes. `memory: blocks` runs the blocks once more. A second moment of T rows
    of width n takes 2 T n^2.

    Args:
        formulas: sizes and settings.
        batches: number of batches of a calibration.
    """
    config, extent = formulas.config, formulas.extent
    side, stages = config.watches_outputs, course(config)
    drawn = side is not None and OUTPUT_GRADIENTS[side] is not None
    one_pass = extent.forward * (4 if config.by_blocks else 3)
    moments = sum(
        2 * rows * ((n * n if extent.leaders[name] == name else 0) + (m * m if side is not None else 0))
        for name, rows in extent.rows.items()
        for m, n in [extent.shapes[name]]
    )
    calibrations = sum(stage.gathers is Phase.CALIBRATE for stage in stages)
    gradients = sum(config.correction_batches for stage in stages if stage.gathers is not Phase.CALIBRATE)
    per_batch = one_pass + 2 * drawn * extent.forward + moments
    passes = calibrations * batches * per_batch + gradients * one_pass
    rounds = 1 if config.refits else 1 + formulas.rounds
    roots = sum(whitening_work(extent.shapes[name][1]) for name in set(extent.leaders.values()))
    roots += sum(whitening_work(m) for m, _ in extent.shapes.values()) if side is not None else 0
    spectra = sum(svd_work(m, n) for m, n in extent.shapes.values())
    return Work(passes, rounds * spectra + (1 if formulas.kept_roots else rounds) * roots)
