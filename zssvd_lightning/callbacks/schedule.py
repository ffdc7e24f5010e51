"""The point of a training run at which the compression takes place, and how much of the run it takes."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NotRequired

from zssvd_lightning._validation import require, require_one_of
from zssvd_lightning.config.settings import CompressionSettings


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When the compression takes place, and for how long.

    Args:
        start_epoch: earliest epoch of the first calibration batch, from 0.
        start_step: earliest global step of it; both must be reached.
        calibration_batches: batches of one calibration, at most; the accumulation window they end in is completed.
        calibration_epochs: the same limit in passes over the training data; the lower of the two holds.
        extend_training: raise `max_steps` and `max_epochs` by what calibration and corrections take of them, so that
            as many steps of training remain as without the callback; whole epochs are added.

    Raises:
        ConfigError: a value is out of range.
    """

    start_epoch: int = 0
    start_step: int = 0
    calibration_batches: int = 128
    calibration_epochs: int = 1
    extend_training: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            ("start_epoch", 0),
            ("start_step", 0),
            ("calibration_batches", 1),
            ("calibration_epochs", 1),
        ):
            require(getattr(self, name) >= least, name, getattr(self, name), f"{least} or more")

    def with_flat(self, settings: dict[str, Any]) -> "Schedule":
        """Return the schedule with the fields that `settings` holds, which are taken out of it, with a warning."""
        flat = {f.name: settings.pop(f.name) for f in fields(self) if f.name in settings}
        if not flat:
            return self
        told = ", ".join(f"{name}={value!r}" for name, value in flat.items())
        warnings.warn(
            f"ZSSVDCallback({told}) is now ZSSVDCallback(schedule=Schedule({told}))", DeprecationWarning, stacklevel=3
        )
        return replace(self, **flat)


def schedule_of(given: Schedule | Mapping[str, Any]) -> Schedule:
    """Return a schedule, made of a mapping of its fields where one is given.

    Raises:
        ConfigError: a field is unknown or out of range.
    """
    if isinstance(given, Schedule):
        return given
    names = [field.name for field in fields(Schedule)]
    for name in given:
        require_one_of("schedule", name, names)
    return Schedule(**given)


class CallbackSettings(CompressionSettings):
    """The keyword arguments of the callback: those of a compression, and the old names of the fields of `Schedule`."""

    start_epoch: NotRequired[int]
    start_step: NotRequired[int]
    calibration_batches: NotRequired[int]
    calibration_epochs: NotRequired[int]
    extend_training: NotRequired[bool]


CallbackSettings.__doc__ = (
    f"{(CompressionSettings.__doc__ or '').rstrip()}"
    + "".join(f"\n        {field.name}: old name of schedule.{field.name}." for field in fields(Schedule))
    + "\n"
)
"""Command lines show the meaning of each keyword from here."""
