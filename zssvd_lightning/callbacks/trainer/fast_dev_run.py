"""Compression under `Trainer(fast_dev_run=...)`: every phase in as few batches as it takes to try it out."""

import logging
from dataclasses import replace
from typing import NamedTuple

import lightning as L

from zssvd_lightning.callbacks.lifecycle import Lifecycle
from zssvd_lightning.callbacks.schedule import Schedule
from zssvd_lightning.callbacks.trainer.guards import most_accumulated
from zssvd_lightning.config.compression import CompressionConfig

logger = logging.getLogger(__name__)


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
        return Asked(config, Schedule(calibration_batches=1, extend_training=True))

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
