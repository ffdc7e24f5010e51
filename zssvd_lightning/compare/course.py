"""The course of a comparison: every cell in a process of its own, and only those that are not there yet.

```
OUTPUT/cells/dense.json                    the dense model
OUTPUT/cells/PRESET-PRUNE_RATIO-SEED.json  each cell, written when it is done, and a .log of its process
OUTPUT/calibration/                        statistics that cells share, while they are needed
OUTPUT/compare.json, .md, .png             the table, when all cells are done
```
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from zssvd_lightning import zero_shot
from zssvd_lightning.compare.arguments import Cell, Comparison, Settings, read_arguments
from zssvd_lightning.compare.results import NAMES, Results, write_results
from zssvd_lightning.compare.work import Job, gathering_result, read_result, write_result
from zssvd_lightning.errors import OutputError

PROGRAM = "zssvd_lightning.compare"
CELLS, CALIBRATION = "cells", "calibration"
ENDINGS = (".json", ".log", ".pt")
"""Of the files in these folders."""

Runner = Callable[[Job], int]
"""Has a job done, and returns the exit code of its process, below 0 for a signal, as `subprocess` does."""


def in_a_process(job: Job) -> int:
    """Does a job in a new process, whose output goes to a file beside the result."""
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    with Path(job.result).with_suffix(".log").open("wb") as log:
        return subprocess.run(  # noqa: S603
            [sys.executable, "-P", "-m", PROGRAM],
            input=json.dumps(asdict(job)).encode(),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": path},
            check=False,
        ).returncode


def compare(arguments: Sequence[str], runner: Runner = in_a_process, progress: bool = True) -> Results:
    """Measures the dense model once, and every preset at every prune ratio with every calibration seed.

    Cells that are in the output folder already, with the same settings, are taken from there. One that fails is told
    of in the results, and the others still run.

    Args:
        arguments: config files of `zssvd compress`, and settings; see `read_arguments`.
        runner: how a job is done.
        progress: whether to draw a progress bar.

    Returns:
        The results, which are also in the output folder.

    Raises:
        ConfigError: the arguments are not possible.
        OutputError: the output folder holds something else, or cannot be written.
        TaskError: a task is unknown or does not load.
    """
    comparison = read_arguments(arguments)
    config = comparison.config
    output = check_folder(config.output)
    if config.tasks:
        zero_shot.load_tasks(config.tasks, config.data, config.include)
    try:
        for folder in (CELLS, CALIBRATION):
            (output / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write to {output}: {error}") from error
    course = _Course(output, comparison, runner)
    dense, cells = course.run(progress)
    results = Results(comparison, dense, {cell: cells[cell] for cell in comparison.cells})
    write_results(output, results)
    course.clear()
    return results


def check_folder(path: str | Path) -> Path:
    """The output folder, when it holds nothing but what a comparison wrote. Raises OutputError."""
    path = Path(path).expanduser().resolve()
    if path.exists() and not path.is_dir():
        raise OutputError(f"output {path} is a file; name a folder")
    foreign = [entry.name for entry in path.glob("*") if not _named(entry, (CELLS, CALIBRATION, *NAMES))]
    for folder in (path / CELLS, path / CALIBRATION):
        if folder.is_file():
            foreign.append(folder.name)
        foreign += [
            f"{folder.name}/{entry.name}"
            for entry in folder.glob("*")
            if not entry.name.startswith(".") and entry.suffix not in ENDINGS
        ]
    if foreign:
        raise OutputError(
            f"output {path} holds {', '.join(sorted(foreign)[:3])}{', ...' if len(foreign) > 3 else ''}, which is of "
            "no comparison; name an empty or new folder"
        )
    return path


def _named(entry: Path, names: Sequence[str]) -> bool:
    """Whether an entry has one of the names, or is what was left when writing it was interrupted."""
    return entry.name in names or entry.name.startswith(tuple(f".{name}." for name in names))


def calibration_name(settings: Settings) -> str:
    """The same for all cells whose first calibration gives the same statistics."""
    if settings.calibration is None or settings.compression is None:
        raise ValueError("the dense model is not calibrated")
    compression = settings.compression
    told = {
        "model": asdict(settings.model),
        "calibration": asdict(settings.calibration),
        "layers": [compression.include, compression.ignore],
        "gathers": list(compression.gathers),
    }
    return f"seed-{settings.calibration.seed}-{sha256(json.dumps(told).encode()).hexdigest()[:12]}"


class _Course:
    """One comparison on its way."""

    def __init__(self, output: Path, comparison: Comparison, runner: Runner) -> None:
        self.cells = output / CELLS
        self.calibration = output / CALIBRATION
        self.comparison = comparison
        self.runner = runner
        self._gathered: dict[str, dict[str, Any]] = {}

    def run(self, progress: bool) -> tuple[dict[str, Any], dict[Cell, dict[str, Any]]]:
        """Results of the dense model and of each cell; cells that share statistics come one after the other."""
        groups: dict[str, list[Cell]] = {}
        seeds = self.comparison.config.seeds
        for cell in sorted(self.comparison.cells, key=lambda cell: seeds.index(cell.seed)):
            groups.setdefault(calibration_name(self.comparison.cells[cell]), []).append(cell)
        found: dict[Cell, dict[str, Any]] = {}
        with tqdm(total=1 + len(self.comparison.cells), unit="cell", disable=not progress) as bar:
            bar.set_description("dense")
            dense = self._result("dense", self.comparison.dense)
            bar.update()
            for shared, cells in groups.items():
                for cell in cells:
                    bar.set_description(f"{cell.preset}, {cell.prune_ratio} pruned, seed {cell.seed}")
                    found[cell] = self._result(cell.name, self.comparison.cells[cell], shared)
                    bar.update()
                self._forget(shared)
        return dense, found

    def clear(self) -> None:
        """Removes shared statistics, also those that interrupted comparisons left, unless they are to be kept."""
        if not self.comparison.config.keep:
            for file in self.calibration.glob("*.pt"):
                self._forget(file.stem)
            for unfinished in self.calibration.glob(".seed-*"):
                shutil.rmtree(unfinished, ignore_errors=True)
        with suppress(OSError):  # not empty
            self.calibration.rmdir()

    def _result(self, name: str, settings: Settings, shared: str | None = None) -> dict[str, Any]:
        """What is there already, or what the runner makes of it."""
        path = self.cells / f"{name}.json"
        if (known := _finished(path, settings)) is not None:
            return known
        if shared is None or not self.comparison.config.share_calibration:
            return self._done(Job(settings, str(path)))
        gathered = self._statistics(shared, settings)
        job = Job(settings, str(path), str(self._file(shared)))
        if "error" in gathered:
            return _failed(job, f"calibration: {gathered['error']}")
        return self._done(job)

    def _statistics(self, shared: str, settings: Settings) -> dict[str, Any]:
        """The result of gathering the statistics of a group of cells, which is done for the first of them."""
        if shared not in self._gathered:
            file = self._file(shared)
            known = read_result(gathering_result(file)) if file.is_file() else None
            if known is None or "error" in known:
                known = self._done(Job(replace(settings, evaluation=None), str(gathering_result(file)), str(file)))
            self._gathered[shared] = known
        return self._gathered[shared]

    def _file(self, shared: str) -> Path:
        return self.calibration / f"{shared}.pt"

    def _done(self, job: Job) -> dict[str, Any]:
        """The result of a job that is now done, or how its process ended without one."""
        path = Path(job.result)
        path.unlink(missing_ok=True)
        code = self.runner(job)
        if (result := read_result(path)) is not None:
            return result
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return _failed(job, f"the process {how}; see {path.with_suffix('.log')}")

    def _forget(self, shared: str) -> None:
        """Removes the statistics of a group of cells, unless they are to be kept or tell of a failure."""
        if self.comparison.config.keep:
            return
        file = self._file(shared)
        file.unlink(missing_ok=True)
        if "error" not in self._gathered.pop(shared, {}):
            for ending in ENDINGS:
                file.with_suffix(ending).unlink(missing_ok=True)


def _finished(path: Path, settings: Settings) -> dict[str, Any] | None:
    """The result of a cell, when it was measured with the same settings and without an error."""
    told = read_result(path)
    same = told is not None and told.get("settings") == json.loads(json.dumps(asdict(settings)))
    return told if told is not None and same and "error" not in told else None


def _failed(job: Job, error: str) -> dict[str, Any]:
    found = {"error": error}
    write_result(job, found)
    return found
