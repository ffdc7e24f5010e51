"""Checks of settings, with errors that name the setting and its valid values."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from zssvd_lightning.errors import ConfigError, MissingExtraError, shown

MOST_NAMED = 30
"""Maximum number of names listed in a message."""


NEARLY = 0.9
"""Similarity of two names (`difflib`) from which one is the other, misspelled."""


MOST_COUNTED = 2**31 - 1
"""Largest number of things that a setting may ask for."""


def closest(name: str, valid: Iterable[str]) -> str:
    """Return `"; did you mean ...?"` for the closest valid dotted name, or a list of the valid names."""
    valid = list(valid)
    by_end = {option.rsplit(".", 1)[-1]: option for option in reversed(valid)}
    near = _spelled_alike(name, valid) or _with_words_of(name, valid)
    near = near or difflib.get_close_matches(name, valid, n=1, cutoff=0.75)
    near = near or [by_end[n] for n in difflib.get_close_matches(name.rsplit(".", 1)[-1], by_end, n=1, cutoff=0.5)]
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; there are {', '.join(valid[:MOST_NAMED])}" + (", ..." if len(valid) > MOST_NAMED else "")


def _spelled_alike(name: str, valid: Iterable[str]) -> list[str]:
    """Return the valid dotted name whose last part is nearly that of a name, best in the same section."""
    section, _, last = name.rpartition(".")
    order = {
        option: (option.rpartition(".")[0] != section, -difflib.SequenceMatcher(None, last, end).ratio())
        for option in valid
        if difflib.get_close_matches(last, [end := option.rpartition(".")[2]], cutoff=NEARLY)
    }
    return sorted(order, key=order.__getitem__)[:1]


def _with_words_of(name: str, valid: Iterable[str]) -> list[str]:
    """Return the valid dotted name whose last part has all the words of that of a name, best in the same section."""
    section, _, last = name.rpartition(".")
    words = set(last.split("_"))
    having = [option for option in valid if words <= set(option.rpartition(".")[2].split("_"))]
    order = {
        option: (option.rpartition(".")[0] != section, not option.endswith(last), len(option)) for option in having
    }
    return sorted(having, key=order.__getitem__)[:1]


def require(holds: bool, name: str, value: object, range_: str) -> None:
    """Raise ConfigError, naming the setting and its range, unless `holds`."""
    if not holds:
        raise ConfigError(f"{name} is {shown(value)}, but must be {range_}")


def require_count(name: str, value: int, least: int, most: int = MOST_COUNTED) -> None:
    """Raise ConfigError, naming the setting and its range, unless `least <= value <= most`."""
    require(value >= least, name, value, f"{least} or more")
    require(value <= most, name, value, f"at most {most:,}")


def require_one_of(name: str, value: str, valid: Iterable[str]) -> None:
    """Raise ConfigError, naming the closest valid value, unless `value` is valid."""
    if not isinstance(value, str):
        raise ConfigError(f"{name} is {shown(value)}, but must be a name, one of {', '.join(valid)}")
    if value not in valid:
        raise ConfigError(f"{name} is {shown(value)}{closest(value, valid)}")


@contextmanager
def needs_extra(extra: str, purpose: str) -> Iterator[None]:
    """Turn an ImportError within the block into a MissingExtraError that names the extra to install.

    Args:
        extra: name under `[project.optional-dependencies]`.
        purpose: subject of the message, in the plural, such as "LoRA adapters".
    """
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(
            f"{purpose} need a package that is not installed ({error}); pip install 'zssvd-lightning[{extra}]'"
        ) from error
