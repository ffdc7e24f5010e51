"""Every example notebook runs, cell by cell in one process, and is stored with its outputs."""

import json
import logging
import warnings
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "docs" / "examples").glob("*.ipynb"))


def test_there_is_an_example():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_an_example_runs_and_shows_what_it_printed(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    names, logger = {}, logging.getLogger("lightning.pytorch")
    level = logger.level
    try:
        with warnings.catch_warnings():
            for cell in cells:
                exec(compile("".join(cell["source"]), str(path), "exec"), names)
                printed = capsys.readouterr().out
                stored = "".join(line for output in cell["outputs"] for line in output.get("text", []))
                assert bool(printed) == bool(stored)
    finally:
        logger.setLevel(level)
