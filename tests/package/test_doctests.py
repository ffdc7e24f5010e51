"""The examples in docstrings run."""

import doctest
import importlib
from pathlib import Path

import pytest

import zssvd_lightning

PACKAGE = Path(zssvd_lightning.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if ">>>" in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("module", MODULES)
def test_examples_give_what_they_say(module):
    results = doctest.testmod(importlib.import_module(module))
    assert results.failed == 0


def test_there_are_examples():
    found = [doctest.DocTestFinder().find(importlib.import_module(module)) for module in MODULES]
    assert sum(len(test.examples) for tests in found for test in tests) >= 5
