"""Whole runs and measurements from settings: all that surrounds a compression, for the command line and recipes."""

import json
import logging
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zssvd_lightning._files import check_output, checked_path, replacing_folder
from zssvd_lightning._resources import Stopwatch, peak_rss_bytes
from zssvd_lightning.app.html.page import write_page
from zssvd_lightning.app.pictures import draw
from zssvd_lightning.app.run_config import EvaluateConfig, RunConfig
from zssvd_lightning.app.workspace import HeldOut, Measurements, by_measure, calibration_windows, training_windows
from zssvd_lightning.compression.pipeline import coverage_of
from zssvd_lightning.compression.report import REPORT, Report, write_report
from zssvd_lightning.errors import ConfigError, ModelSourceError
from zssvd_lightning.evaluation import zero_shot
from zssvd_lightning.hub.loading import from_pretrained
from zssvd_lightning.hub.model_card import write_card
from zssvd_lightning.hub.saving import write_model
from zssvd_lightning.offload.pages import released_behind
from zssvd_lightning.serialization.specs import specs_of
from zssvd_lightning.sources import texts
from zssvd_lightning.sources.models import load_model, no_bar_of_weights, place, refuse_long_windows

logger = logging.getLogger(__name__)


Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


class Run:
    """Model, tokenizer and texts of one run. Everything is loaded and checked at once, before any work is spent.

    Args:
        config: settings of the run.
        progress: whether to draw progress bars.
        device: device of the model, such as `cuda:1`; the GPU if there is one, else the CPU, when None.
        saves: whether `save` will be called, so that the output folder must be fit for it.

    Attributes:
        coverage: share of the model that will be compressed, and what is left alone.

    Raises:
        ConfigError: the device is not available, windows are longer than the inputs of the model, or a setting of tasks
            is given without tasks.
        ModelSourceError: the model cannot be loaded.
        TextError: a text cannot be read or is too short.
        TaskError: a task is unknown or does not load, or a row of it is malformed.
        OutputError: the output folder holds something else, or cannot be written.
        TargetError: a pattern matches no layer, or the layers cannot be compressed.
        BudgetError: the prune ratio cannot be reached with these layers and this storage.
        PlanError: the plan cannot be read or does not match the model.
    """

    def __init__(
        self, config: RunConfig, progress: bool = True, *, device: str | None = None, saves: bool = True
    ) -> None:
        config.evaluation.refuse_unused()
        self.config = config
        self.progress = progress
        self.device = checked_device(device)
        self.output = check_output(config.output, config.model.source) if saves else Path(config.output)
        torch.manual_seed(config.calibration.seed)
        self.model, self.tokenizer = load_model(config.model.source, config.model.dtype)
        self.coverage = coverage_of(self.model, config.compression)
        lengths = {"calibration_length": config.calibration.length}
        if config.recovery is not None:
            lengths["training_length"] = config.training.length
        if config.evaluation.texts:
            lengths["evaluation_length"] = config.evaluation.length
        refuse_long_windows(self.model, **lengths)
        _place(self.model, self.device)
        self._held_out = None if config.recovery is None else HeldOut(self._sources(), config.training, self._tokens)
        tokens_of = self._tokens if self._held_out is None else self._held_out.tokens_of
        self.calibration = texts.TokenWindows(calibration_windows(config.calibration, tokens_of))
        self._measurements = Measurements(config.evaluation, self.tokenizer, self._tokens)
        self._measured: dict[str, dict[str, Any]] = {}
        self._watch = Stopwatch()

    def calibration_loader(self) -> "DataLoader[dict[str, torch.Tensor]]":
        """Return the windows of calibration and corrections in batches, always in the same order."""
        return DataLoader(self.calibration, batch_size=self.config.calibration.batch_size)

    def training_loader(self, steps: int | None = None) -> "DataLoader[dict[str, torch.Tensor]]":
        """Return one batch for each step of `training`, always the same; after all windows the first come again.

        Windows of two texts alternate. Those that judge the training are in none of them.

        Args:
            steps: number of steps; that of `training` when None.

        Raises:
            TextError: the text cannot be read or is shorter than a window.
        """
        training = self.config.training
        tokens_of = self._tokens if self._held_out is None else self._held_out.tokens_of
        every = training_windows(training, self._sources(), tokens_of)
        rounds = texts.TokenWindows(every, length=(steps or training.steps) * training.batch_size)
        return DataLoader(rounds, batch_size=training.batch_size)

    def held_out_loader(self) -> "DataLoader[dict[str, torch.Tensor]]":
        """Return the windows that judge the training, which are in no other batch, always in the same order.

        Raises:
            ConfigError: the run has no recovery.
        """
        if self._held_out is None:
            raise ConfigError("windows are kept back only where a recovery trains; set recovery.method")
        return DataLoader(texts.TokenWindows(self._held_out.windows), batch_size=self.config.training.batch_size)

    def _sources(self) -> list[str]:
        """Return the texts of the training."""
        training, calibration = self.config.training, self.config.calibration
        pair = (calibration.text, calibration.second) if training.text is None else (training.text, training.second)
        return [text for text in pair if text is not None]

    def evaluate(self, which: str, model: PreTrainedModel | None = None) -> None:
        """Measure perplexity on every evaluation text, and accuracy on every task.

        Args:
            which: key in the report, such as `dense` or `compressed`.
            model: model to measure; the run's own when None.
        """
        model = model or self.model
        _place(model, self.device)
        if self._measurements:
            little = released_behind(model) if self.config.compression.may_be_by_blocks else nullcontext()
            with self._watch("evaluate"), little:
                self._measured[which] = self._measurements.of(model, which, self.progress)

    def save(self, report: Report, picture: bool = False) -> None:
        """Complete `report` and write it, the model and the tokenizer to the output folder, all or nothing.

        The page of the report, `report.html`, is written when they are safe.

        The model is cast to its `saved_dtype`. If that changes it, or its storage has 8 bits, the written model is
        loaded again and evaluated as `reloaded`, in the type of the other evaluations.

        Args:
            report: report of the compression.
            picture: whether to draw the report as `report.png`, which needs matplotlib.

        Raises:
            OutputError: writing failed; the previous content of the folder is unchanged.
        """
        dtype = getattr(torch, self.config.model.saved_dtype or self.config.model.dtype)
        changed = self.model.dtype != dtype or self.config.compression.form.rounds
        nn.Module.to(self.model, dtype)
        report.seed = self.config.calibration.seed
        report.config = asdict(self.config)
        with replacing_folder(self.output) as folder:
            with no_bar_of_weights():
                write_model(self.model, folder, self.tokenizer)
            report.file_bytes = {
                "dense": report.model_parameters_before * dtype.itemsize,
                "expected": self._expected_bytes(report, dtype.itemsize),
                "compressed": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
            }
            if changed:
                with no_bar_of_weights():
                    reloaded = from_pretrained(folder, self.config.model.dtype)
                self.evaluate("reloaded", reloaded)
            for name, value in by_measure(self._measured).items():
                setattr(report, name, value)
            report.seconds |= self._watch.seconds
            report.peak_rss_bytes = peak_rss_bytes()
            if picture:
                draw(report, folder / "report.png")
            write_card(folder, self.output.name, specs_of(self.model), report)
            write_report(folder, report)
        write_page([self.output])

    def _expected_bytes(self, report: Report, size: int) -> int:
        """Return the bytes of all remaining numbers; those of targets have 16 bits if the storage has 8."""
        others = report.model_parameters_before - report.parameters_before
        return others * size + report.parameters_after * (2 if self.config.compression.form.rounds else size)

    def _tokens(self, source: str) -> texts.Tokens:
        return _tokens_of(source, self.tokenizer)


def checked_device(name: str | None) -> str | None:
    """Return the name of a device if tensors can be kept on it.

    Raises:
        ConfigError: there is no such device, or it is not available.
    """
    if name is not None:
        try:
            torch.zeros(1, device=name).cpu()
        except (RuntimeError, AssertionError, ImportError) as error:
            cuda = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
            reason = str(error).partition("\n")[0]
            raise ConfigError(
                f"device {name!r} is not available here ({reason}); there are {', '.join(['cpu', *cuda])}"
            ) from error
    return name


def _tokens_of(source: str, tokenizer: PreTrainedTokenizerBase) -> texts.Tokens:
    return texts.tokenize(texts.load_text(source, tokenizer), tokenizer)


def _place(model: PreTrainedModel, device: str | None) -> None:
    """Move a model to a device; to the GPU if there is one, else to the CPU, when None."""
    if device is None:
        place(model)
    else:
        nn.Module.to(model, device)


def recorded_evaluation(model: str) -> dict[str, Any]:
    """Return the evaluation settings in the report of a run's folder, and the model it compressed as `dense`.

    Raises:
        ModelSourceError: the name of the folder is impossible, or the report in it cannot be read.
    """
    path = checked_path(model, ModelSourceError, "model source") / REPORT
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8")).get("config", {})
        return {**config.get("evaluation", {}), "dense": config.get("model", {}).get("source")}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ModelSourceError(f"{path} is no report of a run: {error!r}; move it away") from error


def measure(
    source: str,
    settings: EvaluateConfig,
    *,
    dtype: str = "float32",
    device: str | None = None,
    progress: bool = True,
) -> tuple[dict[str, Any], Table | None]:
    """Measure perplexity and zero-shot accuracy of a saved model.

    Args:
        source: model source.
        settings: texts and tasks.
        dtype: floating-point type of the weights.
        device: device, as for `Run`.
        progress: whether to draw progress bars.

    Returns:
        The measurements in plain types, and a table of the accuracies; None without tasks.

    Raises:
        ZSSVDError: a model, text, task or device is not available.
    """
    if not settings.texts and not settings.tasks:
        records = "records" if Path(source).is_dir() else "is no folder here, and so records"
        raise ConfigError(f"{source} {records} no evaluation text; give one as text=SOURCE, or tasks as tasks=[piqa]")
    settings.refuse_unused()
    device = checked_device(device)
    dense = settings.dense if settings.tasks else None
    tasks = zero_shot.load_tasks(settings.tasks, settings.data, settings.include) if settings.tasks else None
    sources = {"model": source} if dense is None else {"dense": dense, "compressed": source}
    models = {which: _loaded(which, each, dtype) for which, each in sources.items()}
    for _, tokenizer in models.values() if settings.tasks else ():
        zero_shot.check_tokenizer(tokenizer)
    measured: dict[str, Any] = {}
    if settings.texts:
        model, tokenizer = next(reversed(models.values()))
        refuse_long_windows(model, length=settings.length)
        _place(model, device)
        asked = Measurements(replace(settings, tasks=[]), tokenizer, lambda text: _tokens_of(text, tokenizer))
        watch = Stopwatch()
        with watch("seconds"):
            measured |= asked.of(model, source, progress)
        measured |= {"tokens": asked.predictions} | watch.seconds
    if tasks is None:
        return measured, None
    compared, seconds = _accuracy(models, tasks, settings, device)
    measured |= {"models": sources, "tasks": compared, "task_seconds": seconds}
    return measured, zero_shot.table(compared)


def _loaded(which: str, source: str, dtype: str) -> Loaded:
    try:
        return load_model(source, dtype)
    except ModelSourceError as error:
        if which != "dense":
            raise
        raise ModelSourceError(f"dense: {error}; name it as dense=SOURCE, or leave it out with dense=null") from error


def _accuracy(
    models: dict[str, Loaded], tasks: zero_shot.Tasks, settings: EvaluateConfig, device: str | None
) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """Return scores and seconds of every model, and release each once measured, so that the device holds one."""
    scores: dict[str, zero_shot.Scores] = {}
    watch = Stopwatch()
    while models:
        which, (model, tokenizer) = models.popitem()
        logger.info("%s: %s", ", ".join(settings.tasks), which)
        _place(model, device)
        with watch(which):
            scores[which] = zero_shot.accuracy(model, tokenizer, tasks, settings.batch_size, settings.limit)
    return zero_shot.side_by_side(dict(reversed(scores.items()))), watch.seconds
