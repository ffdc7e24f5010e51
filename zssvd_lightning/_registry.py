"""Registries of named objects, to which other packages add by a call or by an entry point."""

import logging
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from types import ModuleType
from typing import Any, TypeVar

from zssvd_lightning.errors import ConfigError

logger = logging.getLogger(__name__)

T = TypeVar("T")

Check = Callable[[str, Any], str | None]
"""Function of a name and an object that returns what the object must be, or None if it is valid."""


class Registry(Mapping[str, T]):
    """Objects of one kind by name: those of this package, registered ones, and those of entry points.

    An entry point is loaded when its name is first looked up. It refers to the object, or to a module that registers
    the object on import. Entry points with the name of a registered object are ignored.

    Args:
        what: the kind, as errors name it.
        group: group of the entry points.
        entries: objects of this package. The registry adds to this dictionary.
        check: check of new objects.
    """

    def __init__(self, what: str, group: str, entries: dict[str, T], check: Check) -> None:
        self._what = what
        self._group = group
        self._entries = entries
        self._check = check

    def register(self, name: str, entry: T) -> None:
        """Add an object under a name.

        Raises:
            ConfigError: the name is taken or no name, or the object is invalid.
        """
        if not isinstance(name, str) or not name:
            raise ConfigError(f"the name of a {self._what} must be a string that is not empty, not {name!r}")
        if name in self._entries:
            raise ConfigError(f"{self._what} {name!r} is registered already; choose another name")
        if (wanted := self._check(name, entry)) is not None:
            raise ConfigError(f"{self._what} {name!r} is {entry!r}, but must be {wanted}")
        self._entries[name] = entry

    def those(self, holds: Callable[[T], bool]) -> list[str]:
        """Return the names of the loaded objects for which `holds` is true."""
        return [name for name, entry in self._entries.items() if holds(entry)]

    def loaded(self) -> dict[str, T]:
        """Load all entry points, and return all objects. Entry points that fail are left out, with a warning."""
        for name in sorted(self._points().keys() - self._entries.keys()):
            try:
                self._load(name)
            except ConfigError as error:
                logger.warning("%s; it is left out", error)
        return dict(self._entries)

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            self._load(name)
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._points()

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._entries, *self._points()]))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def _points(self) -> dict[str, list[metadata.EntryPoint]]:
        """Return the entry points by name. Other than one per name is an error once the name is looked up."""
        found: dict[str, list[metadata.EntryPoint]] = {}
        for point in metadata.entry_points(group=self._group):
            found.setdefault(point.name, []).append(point)
        return found

    def _load(self, name: str) -> None:
        """Load the entry point of a name. Raises KeyError if there is none, and ConfigError if it fails."""
        points = self._points().get(name)
        if points is None:
            raise KeyError(f"no {self._what} {name!r} is registered in this process or offered by {self._group}")
        values = sorted({point.value for point in points})
        if len(values) > 1:
            raise ConfigError(
                f"several packages have an entry point {name!r} of group {self._group!r}: {', '.join(values)}; "
                "uninstall all but one"
            )
        origin = f"entry point {name} = {values[0]!r} of group {self._group!r}"
        try:
            found = points[0].load()
        except Exception as error:
            raise ConfigError(f"{origin} cannot be loaded: {type(error).__name__}: {error}") from error
        if name in self._entries:
            return
        if isinstance(found, ModuleType):
            raise ConfigError(f"{origin} is a module that registers no {self._what} {name!r}")
        try:
            self.register(name, found)
        except ConfigError as error:
            raise ConfigError(f"{origin}: {error}") from error


def instance_of(kind: type, *functions: str) -> Check:
    """Return the check that an object is an instance of `kind` whose attributes `functions` can be called."""

    def check(name: str, entry: Any) -> str | None:
        if not isinstance(entry, kind):
            return f"an instance of {kind.__name__}"
        wrong = [function for function in functions if not callable(getattr(entry, function))]
        return f"a {kind.__name__} whose {' and '.join(wrong)} can be called" if wrong else None

    return check
