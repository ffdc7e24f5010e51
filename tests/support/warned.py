"""Warnings that a test expects, beside those of Lightning that it ignores."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def warned_once(category: type[Warning], match: str) -> Iterator[None]:
    """Fails unless the block gives exactly one warning of the category, which matches."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        yield
    (message,) = [str(warning.message) for warning in given if issubclass(warning.category, category)]
    assert re.search(match, message), message
