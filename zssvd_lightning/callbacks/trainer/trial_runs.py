"""Fits that try a compression out: dry runs, which write a plan of ranks and stop, and `Trainer(fast_dev_run=...)`."""

import logging
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L

from zssvd_lightning._validation import require
from zssvd_lightning.callbacks.lifecycle import Lifecycle
from zssvd_lightning.callbacks.schedule import Schedule
from zssvd_lightning.callbacks.trainer.guards import most_accumulated
from zssvd_lightning.compression.engine import Compression
from zssvd_lightning.compression.phase import Phase
from zssvd_lightning.config.compression import CompressionConfig
from zssvd_lightning.errors import CheckpointError

PLAN_FILE = "zssvd_plan.yaml"
"""Default file name of the plan that a dry run writes."""


logger = logging.getLogger(__name__)


def dry_run_of(given: bool | str | Path, settings: dict[str, Any]) -> bool | Path:
    """Return whether to make a dry run, or the file of its plan; also in its old spelling, `dry_run=True, plan=FILE`.

    Raises:
        ConfigError: the value has another type.
    """
    require(isinstance(given, bool | str | Path), "dry_run", given, "True, False or the path of a file")
    if given is True and settings.get("plan") is not None:
        warnings.warn(
            "dry_run=True with plan=FILE is now dry_run=FILE; plan is a file to follow",
            DeprecationWarning,
            stacklevel=3,
        )
        return Path(settings.pop("plan"))
    return given if isinstance(given, bool) else Path(given)


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


class Asked(NamedTuple):
    """Settings and schedule of a compression."""

    config: CompressionConfig
    schedule: Schedule

    def within(self, trainer: L.Trainer) -> "Asked":
        """Return the settings to use in a fit: these, or under `fast_dev_run` a short form of them.

        In short, each gathering takes one batch, there is one correction at most, and the fit is extended, because the
        batches of `fast_dev_run` are too few for all phases.
        """
        if not self.is_shortened(trainer):
            return self
        config = replace(
            self.config,
            corrections=min(self.config.corrections, 1),
            truncations=min(self.config.truncations, 2),
            correction_batches=1,
        )
        return Asked(
            config, Schedule(calibration_batches=1, extend_training=True, park_optimizer=self.schedule.park_optimizer)
        )

    @staticmethod
    def is_shortened(trainer: L.Trainer) -> bool:
        """Return True if a Trainer takes only a few batches to try its settings out."""
        return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]

    def tell(self, trainer: L.Trainer, short: Lifecycle, *, first_only: bool) -> None:
        """Say on the first process what is shortened, if anything, and how many batches it takes.

        Args:
            trainer: the Trainer at the start of training.
            short: lifecycle of the compression in its short form.
            first_only: True if the fit ends at the first truncation.
        """
        if not self.is_shortened(trainer) or not trainer.is_global_zero:
            return
        logger.warning(
            "fast_dev_run: the compression goes through its phases in short, from the first batch on: 1 batch per "
            "gathering instead of up to %d, and %d of %d corrections. It takes %d batches before the %d of "
            "fast_dev_run, so the fit is longer than Lightning says. Ranks and losses mean nothing",
            self.schedule.calibration_batches,
            short.config.corrections,
            self.config.corrections,
            short.batches_needed(trainer.num_training_batches, most_accumulated(trainer), first_only),
            int(trainer.fast_dev_run),  # type: ignore[attr-defined]
        )
