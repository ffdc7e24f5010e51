"""Dry runs: fits that calibrate, write a plan of ranks, and stop."""

import logging
from pathlib import Path

import lightning as L

from zssvd_lightning.compression.engine import Compression
from zssvd_lightning.compression.phase import Phase
from zssvd_lightning.errors import CheckpointError

PLAN_FILE = "zssvd_plan.yaml"
"""Default file name of the plan that a dry run writes."""


logger = logging.getLogger(__name__)


class DryRun:
    """Run of a fit that writes a plan instead of compressing, if it is asked to.

    Args:
        asked: file of the plan, or True for one in the folder of the logger. False for a compression.

    Attributes:
        planned: True if this fit has made its plan.
    """

    def __init__(self, asked: bool | Path) -> None:
        self.planned = False
        self._asked = asked

    def __bool__(self) -> bool:
        """Return True if a plan is written instead of compressing."""
        return self._asked is not False

    def locate(self, trainer: L.Trainer) -> Path | None:
        """Return the file of the plan, or None for a compression. Collective, since `Trainer.log_dir` is."""
        if not self:
            return None
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        return folder / PLAN_FILE if isinstance(self._asked, bool) else self._asked

    def refuse_state(self, phase: str, *, is_dense: bool) -> None:
        """Raise CheckpointError if a checkpoint of this phase is of a model that is no longer dense."""
        if self and (not is_dense or phase in (Phase.RECOVER, Phase.DONE)):
            raise CheckpointError(
                "a dry run starts from a dense model, but this checkpoint is of a truncated one; resume "
                "from one of before the compression, or without dry_run"
            )

    def write(self, trainer: L.Trainer, compression: Compression, *, shortened: bool) -> None:
        """Choose the ranks and, unless the fit is `shortened`, write them on the first process. Collective.

        Raises:
            CalibrationError: see `Compression.truncate`.
            OutputError: the file cannot be written.
        """
        if compression.safeguard is not None:
            compression.safeguard.check_terms(compression)
        path, plan = self.locate(trainer), compression.plan()
        if path is None:
            raise RuntimeError("write() is for dry runs")
        with compression.team.together():
            if shortened:
                logger.warning("fast_dev_run: the dry run chose ranks, and has not written them to %s", path)
            elif trainer.is_global_zero:
                plan.write(path)
                logger.info("dry run: the ranks are in %s; compress with plan=%s", path, path)
        self.planned = True
