"""Attributes of somebody else's object, replaced for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def overridden(owner: Any, **attributes: Any) -> Iterator[None]:
    """Gives `owner` attributes of its own in place of those of its class; on any exit it has what it had before."""
    own: dict[str, Any] = owner.__dict__
    before = {name: own[name] for name in attributes if name in own}
    own.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            own.pop(name, None)
        own.update(before)
