"""Work of the process of one cell: load the model, compress and measure it, and write the result to a file."""

import json
import math
import platform
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from zssvd_lightning._files import replacing_file
from zssvd_lightning._resources import Stopwatch, peak_rss_bytes
from zssvd_lightning.app.compare.arguments import Settings
from zssvd_lightning.app.run_config import CalibrationConfig, EvaluateConfig, ModelConfig
from zssvd_lightning.app.workspace import Measurements, calibration_windows
from zssvd_lightning.compression.course import course
from zssvd_lightning.compression.gathering import loss_in
from zssvd_lightning.compression.pipeline import calibrate, compress, coverage_of
from zssvd_lightning.compression.report import VERSIONS
from zssvd_lightning.config.compression import CompressionConfig
from zssvd_lightning.config.loading import load_config
from zssvd_lightning.errors import NonFiniteError, SavedModelError, ZSSVDError
from zssvd_lightning.evaluation.rows import ROWS, rows_file
from zssvd_lightning.serialization.integrity import digest
from zssvd_lightning.sources import texts
from zssvd_lightning.sources.models import load_model, place, refuse_long_windows
from zssvd_lightning.whitening.moments import Moments

CALIBRATE = "calibrate"
"""Name of the step whose time cells may share."""


@dataclass(frozen=True)
class Job:
    """Work of one process."""

    settings: Settings = field(default_factory=Settings)
    result: str = "???"
    """JSON file to write, on success and on failure."""
    statistics: str | None = None
    """File with the statistics of the first calibration. It is written by a job without evaluation and read by others;
    when None, the job gathers the statistics."""
    checks: dict[str, Any] = field(default_factory=dict)
    """`Settings` of cells as plain mappings, by name. The job only checks their layers, budgets and windows."""


def read_job(text: str) -> Job:
    """Parse a job from JSON."""
    return load_config(Job, defaults=json.loads(text))


def perform(job: Job) -> None:
    """Run a job and write its result, or the error that ended it.

    Raises:
        Exception: the error that ended the job.
    """
    read = sources(job.settings)
    try:
        found = _found(job)
    except Exception as error:
        write_result(job, read, {"error": one_line(f"{type(error).__name__}: {error}")})
        raise
    write_result(job, read, found)


def write_result(job: Job, read: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Write the result of a job as JSON, together with its settings and package versions.

    Args:
        job: the job.
        read: state of the sources that the job has read, from `sources`.
        found: measurements of the job, or its error.

    Raises:
        OutputError: the file cannot be written.
    """
    told = {"settings": asdict(job.settings), "versions": versions(), "sources": read, **found}
    with replacing_file(job.result) as file:
        file.write_text(json.dumps(told, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_result(path: Path) -> dict[str, Any] | None:
    """Return the content of a result file; None if it does not exist or cannot be read."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return told if isinstance(told, dict) else None


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages on which results depend."""
    return {"python": platform.python_version(), **{name: version(name) for name in VERSIONS}}


def sources(settings: Settings) -> dict[str, str | None]:
    """Return the state of the model, texts and folders that settings name, to detect later changes.

    The state of a package is its version; that of a file or folder is a digest of its content. It is None for sources
    on the hub.
    """
    calibration, evaluation = settings.calibration, settings.evaluation
    read = [] if calibration is None else [text for text in (calibration.text, calibration.second) if text is not None]
    folders = [settings.model.source]
    if evaluation is not None:
        read += evaluation.texts.values()
        folders += [folder for folder in (evaluation.data, evaluation.include) if folder is not None]
        files = [rows_file(task, evaluation.data) for task in evaluation.tasks if task.endswith(ROWS)]
        folders += [str(file.path) for file in files if file is not None]
    return {source: _state(source.partition("#")[0]) for source in read} | {
        source: _state(source) for source in folders
    }


def _state(source: str) -> str | None:
    """Return the state of one source; see `sources`."""
    if source.startswith("package:"):
        with suppress(PackageNotFoundError):
            return version(source.split(":")[1])
        return None
    try:
        files = list(_files(Path(source).expanduser()))
    except (OSError, SavedModelError):
        return None
    return sha256(json.dumps(files).encode()).hexdigest() if files else None


def _files(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the name and digest of a file, or of every file in a folder."""
    for file in [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file()):
        told = file.stat()
        yield str(file.relative_to(path)), _digest(file, told.st_size, told.st_mtime_ns)


@cache
def _digest(path: Path, size: int, time: int) -> str:
    """Return the digest of a file; it is read again only if its size or modification time (ns) has changed."""
    return digest(path)


def one_line(text: str) -> str:
    """Return the text on one line, with single spaces."""
    return " ".join(text.split())


class Material:
    """Model with its tokenizer and texts, each tokenized once.

    Args:
        config: settings of the model.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.model, self.tokenizer = load_model(config.source, config.dtype)
        place(self.model)
        self._tokens: dict[str, texts.Tokens] = {}

    def batches(self, config: CalibrationConfig) -> "DataLoader[dict[str, Tensor]]":
        """Return the windows for calibration and corrections, always in the same order.

        Raises:
            ConfigError: the windows are longer than the inputs of the model.
            TextError: a text cannot be read or is too short.
        """
        refuse_long_windows(self.model, calibration_length=config.length)
        drawn = calibration_windows(config, self._tokenized)
        return DataLoader(texts.TokenWindows(drawn), batch_size=config.batch_size)

    def measurements(self, config: EvaluateConfig) -> Measurements:
        """Return what to measure.

        Raises:
            TextError: a text cannot be read or is too short.
            TaskError: a task is unknown or does not load.
        """
        return Measurements(config, self.tokenizer, self._tokenized)

    def measured(self, asked: Measurements) -> dict[str, Any]:
        """Measure the current model: return perplexities, accuracies and the seconds taken.

        Raises:
            NonFiniteError: a perplexity or a log-likelihood is not finite.
        """
        watch = Stopwatch()
        place(self.model)
        with watch("evaluate"):
            found = asked.of(self.model, "", progress=False)
        for key, value in (*found.items(), *found.get("word_perplexity", {}).items()):
            if isinstance(value, float) and not math.isfinite(value):
                raise NonFiniteError(f"{key} is not finite ({value}); prune less, or measure in float32")
        return {**found, "evaluate_seconds": watch.seconds["evaluate"]}

    def _tokenized(self, source: str) -> texts.Tokens:
        if source not in self._tokens:
            self._tokens[source] = texts.tokenize(texts.load_text(source, self.tokenizer), self.tokenizer)
        return self._tokens[source]


def _found(job: Job) -> dict[str, Any]:
    settings = job.settings
    if job.checks:
        return {"refused": _refused(job)}
    if settings.calibration is not None and settings.compression is not None:
        if settings.evaluation is not None:
            return _compressed(job, settings.calibration, settings.compression, settings.evaluation)
        if job.statistics is not None:
            return _gathered(job, settings.calibration, settings.compression, job.statistics)
    elif settings.evaluation is not None:
        material = Material(settings.model)
        return material.measured(material.measurements(settings.evaluation))
    raise ValueError(f"a job that evaluates nothing must calibrate into a file: {job}")


def _refused(job: Job) -> dict[str, str]:
    """Return the error of each cell that the model refuses, by name. No text is read."""
    model, _ = load_model(job.settings.model.source, job.settings.model.dtype)
    refused = {}
    for name, tree in job.checks.items():
        settings = load_config(Settings, defaults=tree)
        try:
            if settings.calibration is not None:
                refuse_long_windows(model, calibration_length=settings.calibration.length)
            if settings.evaluation is not None and settings.evaluation.texts:
                refuse_long_windows(model, evaluation_length=settings.evaluation.length)
            if settings.compression is not None:
                coverage_of(model, settings.compression)
        except ZSSVDError as error:
            refused[name] = one_line(f"{type(error).__name__}: {error}")
    return refused


def _gathered(
    job: Job, calibration: CalibrationConfig, compression: CompressionConfig, statistics: str
) -> dict[str, Any]:
    """Gather the statistics of a first calibration and write them to a file."""
    torch.manual_seed(calibration.seed)
    material = Material(job.settings.model)
    batches, watch = material.batches(calibration), Stopwatch()
    with watch(CALIBRATE):
        moments = calibrate(
            material.model,
            batches,
            compression,
            calibration_batches=calibration.batches,
            progress=False,
            loss=loss_in(calibration.precision_on(material.model.device)),
        )
    peak = peak_rss_bytes()
    with replacing_file(statistics) as file:
        torch.save(moments.state_dict(), file)
    return {"seconds": watch.seconds, "peak_rss_bytes": peak}


def _compressed(
    job: Job, calibration: CalibrationConfig, compression: CompressionConfig, measure: EvaluateConfig
) -> dict[str, Any]:
    """Compress the model, from shared statistics or newly gathered ones, and measure it."""
    torch.manual_seed(calibration.seed)
    material = Material(job.settings.model)
    asked = material.measurements(measure)
    gathers_more = job.statistics is None or len(course(compression)) > 1
    report = compress(
        material.model,
        material.batches(calibration) if gathers_more else [],
        compression,
        statistics=_statistics(job.statistics),
        calibration_batches=calibration.batches,
        refuse_diverged=False,
        progress=False,
        loss=loss_in(calibration.precision_on(material.model.device)),
    )
    seconds, peak = dict(report.seconds), peak_rss_bytes()
    if job.statistics is not None:
        gathering = json.loads(gathering_result(job.statistics).read_text(encoding="utf-8"))
        seconds = {CALIBRATE: 0.0} | seconds
        seconds[CALIBRATE] += gathering["seconds"][CALIBRATE]
        peak = max(peak, gathering["peak_rss_bytes"])
    return {
        "reached": report.reached,
        "seconds": seconds,
        "peak_rss_bytes": peak,
        **material.measured(asked),
    }


def gathering_result(statistics: str | Path) -> Path:
    """Return the path of the result of the job that gathered these statistics."""
    return Path(statistics).with_suffix(".json")


def _statistics(path: str | None) -> Moments | None:
    return None if path is None else Moments(**torch.load(path, map_location="cpu", weights_only=True))
