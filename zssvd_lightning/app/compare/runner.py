"""Execution of a comparison: each cell runs in a separate process, unless its result already exists.

```
OUTPUT/cells/dense.json                    the dense model
OUTPUT/cells/PRESET-PRUNE_RATIO-SEED.json  each cell, written when it is done, and a .log of its process
OUTPUT/calibration/                        statistics that cells share, while they are needed
OUTPUT/compare.json, .md, .png             the table, when all cells are done
```
"""

import json
import os
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

from zssvd_lightning.app.command import ended_by_exit
from zssvd_lightning.app.compare.arguments import Cell, Comparison, Settings, read_arguments
from zssvd_lightning.app.compare.cell import Job, gathering_result, read_result, sources, versions, write_result
from zssvd_lightning.app.compare.folder import CALIBRATION, CELLS, alone_in, check_folder, clear_unfinished, is_own
from zssvd_lightning.app.compare.results import Results, write_results
from zssvd_lightning.app.run_config import EvaluateConfig
from zssvd_lightning.config.compression import CompressionConfig, settings_of_saved
from zssvd_lightning.config.derived import OPT_INS
from zssvd_lightning.config.placement import PLACES
from zssvd_lightning.errors import ConfigError
from zssvd_lightning.evaluation import zero_shot

PROGRAM = "zssvd_lightning.app.compare"


ENDINGS = (".pt", ".json", ".log")
"""Extensions of the files of shared statistics; the large file comes first."""


Runner = Callable[[Job], int]
"""Function that runs a job and returns the exit code of its process, below 0 for a signal, as in `subprocess`."""


def in_a_process(job: Job) -> int:
    """Run a job in a new process, log its output to a file beside the result, and return the exit code."""
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
    """Measure the dense model once, and every preset at every prune ratio with every calibration seed.

    First, the layers, budgets and windows of all cells that are to run are checked on the model, before a text is read.
    Results already in the output folder are reused if settings, versions, model and texts are the same. If a cell
    fails, the results contain its error and the other cells still run.

    Args:
        arguments: config files of `zssvd compress`, and settings; see `read_arguments`.
        runner: function that runs a job.
        progress: whether to draw a progress bar.

    Returns:
        The results, which are also written to the output folder.

    Raises:
        ConfigError: the arguments are invalid, or the model refuses all cells.
        OutputError: the output folder has other content, cannot be written, or is in use by another comparison.
        TaskError: a task is unknown or does not load.
    """
    comparison = read_arguments(arguments)
    config = comparison.config
    output = check_folder(config.output)
    asked = comparison.dense.evaluation
    if asked is not None and asked.tasks:
        zero_shot.load_tasks(asked.tasks, asked.data, asked.include)
    with alone_in(output), ended_by_exit():
        course = _Course(output, comparison, runner)
        dense, cells = course.run(progress)
        results = Results(comparison, dense, {cell: cells[cell] for cell in comparison.cells})
        write_results(output, results)
        course.clear()
    return results


def gathering_settings(settings: Settings) -> Settings:
    """Return the settings on which the statistics of a first calibration depend.

    They are equal for all cells that can share the statistics.

    Raises:
        ValueError: the settings are those of the dense model, which is not calibrated.
    """
    compression = settings.compression
    if settings.calibration is None or compression is None:
        raise ValueError("the dense model is not calibrated")
    side = compression.watches_outputs
    layers = CompressionConfig(
        metric="input" if side is None else "two_sided",
        output_side=side or CompressionConfig.output_side,
        include=compression.include,
        ignore=compression.ignore,
        **{name: getattr(compression, name) for name in OPT_INS},
    )
    calibration = replace(settings.calibration, correction_samples=0)
    return replace(settings, calibration=calibration, compression=layers, evaluation=None)


def calibration_name(gathering: Settings) -> str:
    """Return the stem of the names of the files with the statistics for these settings."""
    seed = 0 if gathering.calibration is None else gathering.calibration.seed
    told = json.dumps(_comparable(_plain(gathering)))
    return f"seed-{seed}-{sha256(told.encode()).hexdigest()[:12]}"


class _Course:
    """Execution of one comparison."""

    def __init__(self, output: Path, comparison: Comparison, runner: Runner) -> None:
        self.output = output
        self.cells = output / CELLS
        self.calibration = output / CALIBRATION
        self.comparison = comparison
        self.runner = runner
        self._gathered: dict[str, dict[str, Any]] = {}
        self._failed: set[str] = set()
        self._refused: dict[str, str] = {}

    def run(self, progress: bool) -> tuple[dict[str, Any], dict[Cell, dict[str, Any]]]:
        """Return the results of the dense model and of each cell; cells that share statistics run in succession."""
        groups: dict[str, list[Cell]] = {}
        seeds = self.comparison.config.seeds
        for cell in sorted(self.comparison.cells, key=lambda cell: seeds.index(cell.seed)):
            shared = calibration_name(gathering_settings(self.comparison.cells[cell]))
            groups.setdefault(shared, []).append(cell)
        found: dict[Cell, dict[str, Any]] = {}
        self._check()
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
        """Remove leftovers of interrupted comparisons, and shared statistics unless `keep` is set."""
        clear_unfinished(self.output)
        for file in list(self.calibration.glob("*")):
            if is_own(file, CALIBRATION):
                self._forget(file.stem)
        with suppress(OSError):  # not empty
            self.calibration.rmdir()

    def _check(self) -> None:
        """Note which of the cells to run the model refuses, each for itself or with other seeds.

        Raises:
            ConfigError: it refuses all of them.
        """
        cells = self.comparison.cells
        todo = [cell for cell in cells if _finished(self.cells / f"{cell.name}.json", cells[cell]) is None]
        alike: dict[tuple[str, float], Cell] = {}
        for cell in todo:
            alike.setdefault((cell.preset, cell.prune_ratio), cell)
        if not todo:
            return
        checks = {cell.name: asdict(cells[cell]) for cell in alike.values()}
        job = Job(Settings(self.comparison.dense.model), str(self.cells / "check.json"), checks=checks)
        refused = self._done(job).get("refused", {})  # without a result the cells say themselves what is wrong
        for ending in ENDINGS[1:]:
            Path(job.result).with_suffix(ending).unlink(missing_ok=True)
        errors = {key: refused[cell.name] for key, cell in alike.items() if cell.name in refused}
        if len(errors) == len(alike):
            (preset, prune_ratio), error = next(iter(errors.items()))
            raise ConfigError(f"no cell can run, for instance {preset} at {prune_ratio}: {error}")
        self._refused = {cell.name: errors[key] for cell in todo if (key := (cell.preset, cell.prune_ratio)) in errors}

    def _result(self, name: str, settings: Settings, shared: str | None = None) -> dict[str, Any]:
        """Return the existing result of a cell, or run the cell."""
        path = self.cells / f"{name}.json"
        if (known := _finished(path, settings)) is not None:
            return known
        if name in self._refused:
            return _failed(Job(settings, str(path)), self._refused[name])
        if shared is None or not self.comparison.config.share_calibration:
            return self._done(Job(settings, str(path)))
        gathered = self._statistics(shared, settings)
        job = Job(settings, str(path), str(self._file(shared)))
        if "error" in gathered:
            return _failed(job, f"calibration: {gathered['error']}")
        return self._done(job)

    def _statistics(self, shared: str, settings: Settings) -> dict[str, Any]:
        """Return the result of gathering the statistics of a group of cells; they are gathered for the first cell."""
        if shared not in self._gathered:
            file = self._file(shared)
            gathering = gathering_settings(settings)
            known = _finished(gathering_result(file), gathering) if file.is_file() else None
            if known is None:
                known = self._done(Job(gathering, str(gathering_result(file)), str(file)))
            self._gathered[shared] = known
        return self._gathered[shared]

    def _file(self, shared: str) -> Path:
        return self.calibration / f"{shared}.pt"

    def _done(self, job: Job) -> dict[str, Any]:
        """Run a job and return its result, or an error with the way its process ended if it left no result."""
        path = Path(job.result)
        path.unlink(missing_ok=True)
        code = self.runner(job)
        if (result := _told(path, job.settings)) is not None:
            return result
        how = f"ended with exit code {code}"
        if code < 0:
            how = f"was ended by signal {-code} ({signal.strsignal(-code) or 'of no name'})"
        return _failed(job, f"the process {how}; see {path.with_suffix('.log')}")

    def _forget(self, shared: str) -> None:
        """Remove the statistics of a group of cells, unless `keep` is set; the log and error of a failure stay."""
        if "error" in self._gathered.pop(shared, {}):
            self._failed.add(shared)
        if self.comparison.config.keep:
            return
        for ending in ENDINGS[:1] if shared in self._failed else ENDINGS:
            self._file(shared).with_suffix(ending).unlink(missing_ok=True)


def _told(path: Path, settings: Settings) -> dict[str, Any] | None:
    """Return the result or error of the job with these settings; None if the file has neither."""
    told = read_result(path)
    return told if told is not None and _comparable(told.get("settings")) == _comparable(_plain(settings)) else None


def _plain(settings: Settings) -> Any:
    return json.loads(json.dumps(asdict(settings)))


def _comparable(told: Any) -> Any:
    """Return the settings of a result on which it depends.

    Those of the compression and the evaluation that did not exist when it was written are added, and those that only
    say where things are in memory are left out.
    """
    if isinstance(told, dict) and isinstance(evaluation := told.get("evaluation"), dict):
        told = told | {"evaluation": asdict(EvaluateConfig()) | evaluation}
    if not isinstance(told, dict) or not isinstance(told.get("compression"), dict):
        return told
    found = settings_of_saved(told["compression"])
    return told | {"compression": {key: value for key, value in found.items() if key not in PLACES}}


def _finished(path: Path, settings: Settings) -> dict[str, Any] | None:
    """Return the result of a successful job with the same settings, versions, model and texts; None without one."""
    told = _told(path, settings)
    if told is None or "error" in told or told.get("versions") != versions():
        return None
    return told if told.get("sources") == sources(settings) else None


def _failed(job: Job, error: str) -> dict[str, Any]:
    found = {"error": error}
    write_result(job, sources(job.settings), found)
    return found
