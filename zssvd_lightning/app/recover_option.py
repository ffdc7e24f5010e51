"""The option `--recover`: steps or time of the training after compression, as settings of a run."""

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from zssvd_lightning.config.presets import DEFAULT_TRAINED, trained_by
from zssvd_lightning.errors import ConfigError

if TYPE_CHECKING:
    from zssvd_lightning.app.run_config import RunConfig

MINUTES = {"s": 1 / 60, "sec": 1 / 60, "m": 1.0, "min": 1.0, "h": 60.0}
"""Minutes in a unit of time."""


def with_recovery(settings: "RunConfig", recover: str) -> "RunConfig":
    """Return the settings with a training of so many steps or so long.

    Without a recovery in the settings, that of the preset `DEFAULT_TRAINED` is added.

    Args:
        settings: settings of a run.
        recover: a number of steps, such as `200`, or a time, such as `10min`, `90s` or `1h`.

    Raises:
        ConfigError: `recover` has another form, or is 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", recover.strip())
    unit = found[2] if found else None
    amount = float(found[1]) if found else 0.0
    if amount <= 0 or (unit and unit not in MINUTES) or (not unit and amount != int(amount)):
        raise ConfigError(
            f"--recover is {recover!r}, but must be a number of steps, such as 200, or a time, such as 10min, 90s or 1h"
        )
    recovery = dict(settings.recovery if settings.recovery is not None else trained_by(DEFAULT_TRAINED)[1])
    if unit:
        return replace(settings, recovery=recovery | {"minutes": amount * MINUTES[unit]})
    recovery.pop("minutes", None)
    return replace(settings, recovery=recovery, training=replace(settings.training, steps=int(amount)))


def refuse_recovery(settings: "RunConfig") -> None:
    """Raise ConfigError if the settings have a recovery that cannot follow the compression."""
    from zssvd_lightning.callbacks.recovery import refuse_contradictions
    from zssvd_lightning.recovery.methods import recovery_of

    recovery = recovery_of(settings.recovery)
    if recovery is not None and recovery.lr is None:
        raise ConfigError("recovery.lr is null, but there is no other optimizer here; set it")
    refuse_contradictions(settings.compression, recovery)
