"""Schedule of a compression within a training run: its start and its length, and what rests meanwhile."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NotRequired, Protocol, runtime_checkable

from zssvd_lightning._types import check_types
from zssvd_lightning._validation import require, require_one_of
from zssvd_lightning.compression.phase import Phase
from zssvd_lightning.compression.report import Report
from zssvd_lightning.config.settings import CompressionSettings
from zssvd_lightning.offload.parking import PARKS

FLAT = ("start_epoch", "start_step", "calibration_batches", "calibration_epochs", "extend_training")
"""Fields of `Schedule` that were keyword arguments of the callback."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Start and length of the compression, and what rests meanwhile.

    Args:
        start_epoch: earliest epoch of the first calibration batch, from 0.
        start_step: earliest global step of the first calibration batch. Both conditions must hold.
        calibration_batches: maximum number of batches per calibration. The accumulation window in which they end is
            completed.
        calibration_epochs: maximum number of passes over the training data per calibration. The lower limit applies.
        extend_training: raise `max_steps` and `max_epochs` by the steps and epochs that calibration and corrections
            use, so that as many training steps remain as without the callback. Epochs are added as whole epochs.
        park_optimizer: move the state of the optimizer out of the way until its next step: to host memory, or with
            `offload="disk"` to a scratch file. `auto` does so only for the state of an accelerator, and only with an
            `offload` other than `none`; False never.

    Raises:
        ConfigError: a value has another type or is out of range.

    Example:
        >>> schedule = Schedule(start_step=100, calibration_batches=64, extend_training=True)
    """

    start_epoch: int = 0
    start_step: int = 0
    calibration_batches: int = 128
    calibration_epochs: int = 1
    extend_training: bool = False
    park_optimizer: bool | str = "auto"

    def __post_init__(self) -> None:
        check_types(self)
        for name, least in (
            ("start_epoch", 0),
            ("start_step", 0),
            ("calibration_batches", 1),
            ("calibration_epochs", 1),
        ):
            require(getattr(self, name) >= least, name, getattr(self, name), f"{least} or more")
        require(self.park_optimizer in PARKS, "park_optimizer", self.park_optimizer, "True, False or 'auto'")

    def with_flat(self, settings: dict[str, Any]) -> "Schedule":
        """Return the schedule updated with those of `FLAT` in `settings`, which are removed there with a warning."""
        flat = {name: settings.pop(name) for name in FLAT if name in settings}
        if not flat:
            return self
        told = ", ".join(f"{name}={value!r}" for name, value in flat.items())
        warnings.warn(
            f"ZSSVDCallback({told}) is now ZSSVDCallback(schedule=Schedule({told}))", DeprecationWarning, stacklevel=3
        )
        return replace(self, **flat)


def schedule_of(given: Schedule | Mapping[str, Any]) -> Schedule:
    """Return a schedule, built from a mapping of its fields if one is given.

    Raises:
        ConfigError: a field is unknown, has another type or is out of range.
    """
    if isinstance(given, Schedule):
        return given
    require(isinstance(given, Mapping), "schedule", given, "a Schedule or a mapping of its fields")
    names = [field.name for field in fields(Schedule)]
    for name in given:
        require_one_of("schedule", name, names)
    return Schedule(**given)


@runtime_checkable
class ScheduledCompression(Protocol):
    """Callback that compresses the model at a scheduled point of the fit, such as `ZSSVDCallback`."""

    schedule: Schedule
    """Start and length of the compression."""

    @property
    def phase(self) -> Phase:
        """Current phase of the compression."""

    @property
    def report(self) -> Report | None:
        """Report of the compression; None before factorization."""


class CallbackSettings(CompressionSettings):
    """Keyword arguments of the callback: compression settings, and old names of the fields of `Schedule`."""

    start_epoch: NotRequired[int]
    start_step: NotRequired[int]
    calibration_batches: NotRequired[int]
    calibration_epochs: NotRequired[int]
    extend_training: NotRequired[bool]


CallbackSettings.__doc__ = (
    f"{(CompressionSettings.__doc__ or '').rstrip()}"
    + "".join(f"\n        {name}: old name of schedule.{name}." for name in FLAT)
    + "\n"
)
"""Documentation of each keyword, which command lines show."""
