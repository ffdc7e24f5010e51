"""The command line, run in the process of the tests."""

import sys
from typing import NamedTuple

import pytest

from zssvd_lightning.app.cli import main


class Done(NamedTuple):
    """A command that has ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def zssvd(monkeypatch, capsys):
    """Runs the command in this process, which saves importing torch each time."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["zssvd", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return Done(ended.value.code or 0, *capsys.readouterr())

    return run
