"""Registries of named objects, to which other packages add by a call or by an entry point."""

from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from typing import Any, TypeVar

from zssvd_lightning.errors import ConfigError

T = TypeVar("T")

Check = Callable[[str, Any], str | None]
"""Function that gets a name and an object, and returns what the object must be; None if it is that."""


class Registry(Mapping[str, T]):
    """Objects of one kind by name: those of this package, registered ones, and those of entry points.

    Each entry point is loaded when its name is first looked up. It refers to the object, or to a module that registers
    the object when it is imported.

    Args:
        what: the kind, as errors name it.
        group: group of the entry points.
        entries: objects of this package; the registry adds to this dictionary.
        check: what an object must be.
    """

    def __init__(self, what: str, group: str, entries: dict[str, T], check: Check) -> None:
        self._what = what
        self._group = group
        self._entries = entries
        self._check = check

    def register(self, name: str, entry: T) -> None:
        """Add an object under a name.

        Raises:
            ConfigError: the name is taken, or the object is not of the kind.
        """
        if name in self._entries:
            raise ConfigError(f"{self._what} {name!r} is registered already; choose another name")
        if (wanted := self._check(name, entry)) is not None:
            raise ConfigError(f"{self._what} {name!r} is {entry!r}, but must be {wanted}")
        self._entries[name] = entry

    def those(self, holds: Callable[[T], bool]) -> list[str]:
        """Return the names of the objects, of those loaded so far, for which `holds` is true."""
        return [name for name, entry in self._entries.items() if holds(entry)]

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

    def _points(self) -> dict[str, metadata.EntryPoint]:
        return {point.name: point for point in metadata.entry_points(group=self._group)}

    def _load(self, name: str) -> None:
        """Load the entry point of a name. Raises KeyError if there is none, and ConfigError if it fails."""
        point = self._points()[name]
        origin = f"entry point {point.name} = {point.value!r} of group {self._group!r}"
        try:
            found = point.load()
        except Exception as error:
            raise ConfigError(f"{origin} cannot be loaded: {type(error).__name__}: {error}") from error
        if name not in self._entries:
            try:
                self.register(name, found)
            except ConfigError as error:
                raise ConfigError(f"{origin}: {error}") from error


def instance_of(kind: type) -> Check:
    """Return the check that an object is an instance of a class."""
    return lambda _, entry: None if isinstance(entry, kind) else f"an instance of {kind.__name__}"
