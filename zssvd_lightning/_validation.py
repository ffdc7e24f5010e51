"""Checks of settings, with errors that name the setting and what it takes."""

import difflib
from collections.abc import Iterable

from zssvd_lightning.errors import ConfigError

MOST_NAMED = 30
"""Names a message lists at most."""


def closest(name: str, valid: Iterable[str]) -> str:
    """`"; did you mean ...?"` for the nearest valid dotted name, or a list of what there is."""
    valid = list(valid)
    by_end = {option.rsplit(".", 1)[-1]: option for option in reversed(valid)}
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.75)
    near = near or [by_end[n] for n in difflib.get_close_matches(name.rsplit(".", 1)[-1], by_end, n=1, cutoff=0.5)]
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; there are {', '.join(valid[:MOST_NAMED])}" + (", ..." if len(valid) > MOST_NAMED else "")


def require(holds: bool, name: str, value: object, range_: str) -> None:
    """Raises ConfigError, naming the setting and its range, unless `holds`."""
    if not holds:
        raise ConfigError(f"{name} is {value!r}, but must be {range_}")


def require_one_of(name: str, value: str, valid: Iterable[str]) -> None:
    """Raises ConfigError, naming the nearest valid value, unless `value` is one of them."""
    if value not in valid:
        raise ConfigError(f"{name} is {value!r}{closest(value, valid)}")
