"""Model card of a compressed model: method, calibration data, results and how to load it."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, metadata, version
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.modelcard import TASK_MAPPING

from zssvd_lightning.compression.report import Report
from zssvd_lightning.compression.report_table import PERPLEXITIES, perplexity_title, words_and_tasks
from zssvd_lightning.evaluation.zero_shot import metrics_of
from zssvd_lightning.model.coverage import Coverage

CARD = "README.md"

WORDS = {
    "low_rank": "two factors, floating point",
    "pivoted": "pivot rows and the coefficients of the others, floating point",
    "pivoted_columns": "pivot columns and the coefficients of the others, floating point",
    "int8_low_rank": "two factors, 8 bits",
    "int8": "dense, 8 bits",
    "narrow": "dense, with fewer hidden units",
    "removed": "matrix of a removed expert",
}

GENERATION = "text-generation"
"""Pipeline tag of models that continue a text."""


def write_card(folder: Path, name: str, specs: Mapping[str, Mapping[str, Any]], report: Report | None) -> None:
    """Write `README.md` into the folder of a compressed model; nothing is written for a dense model.

    The metadata for the hub has the base model, its license and the pipeline tag, as far as they are known, and the
    measured perplexities and accuracies.

    Args:
        folder: folder of the model.
        name: name of the model, by which the card loads it.
        specs: kind and sizes of its compressed layers, by name.
        report: report of the compression, if there is one.
    """
    if not specs:
        return
    source = None if report is None else report.config.get("model", {}).get("source")
    task = _task(folder)
    data = ModelCardData(
        base_model=source if isinstance(source, str) and _is_on_hub(source) else None,
        license=_license(source) if isinstance(source, str) else None,
        library_name="transformers",
        pipeline_tag=task,
        tags=["zssvd", "low-rank", "compression"],
        model_name=name,
        eval_results=[] if report is None else list(_results(report, task)),
    )
    card = ModelCard.from_template(
        data,
        template_str=files("zssvd_lightning").joinpath("hub", "model_card.md").read_text(encoding="utf-8"),
        name=name,
        source=source,
        version=version("zssvd-lightning"),
        report=None if report is None else _done(report),
        kinds=[(WORDS.get(kind, kind), count) for kind, count in Counter(s["kind"] for s in specs.values()).items()],
        generates=task == GENERATION and (folder / "tokenizer_config.json").exists(),
        self_contained=(folder / "modeling_zssvd.py").exists(),
    )
    card.save(folder / CARD)


def _is_on_hub(source: str) -> bool:
    return re.fullmatch(r"[\w-]+/[\w.-]+", source) is not None and not Path(source).exists()


def _task(folder: Path) -> str | None:
    """Return the pipeline tag of a saved model by its class, as transformers knows it; None if it knows none."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    named = next(iter(config.get("architectures") or ()), None)
    tasks: dict[str, Any] = TASK_MAPPING
    for task, classes in tasks.items():
        for name in classes.values():
            if named in ((name,) if isinstance(name, str) else tuple(name)):
                return task
    return None


def _license(source: str) -> str | None:
    """Return the license of a model that is a package or a folder with a model card; None if it is not known."""
    if source.startswith("package:"):
        try:
            told: Any = metadata(source.removeprefix("package:"))
        except PackageNotFoundError:
            return None
        found = told.get("License-Expression") or told.get("License") or ""
        return found.lower() if re.fullmatch(r"[\w.+-]+", found) else None
    card = Path(source) / CARD
    if not card.is_file():
        return None
    license_: str | None = ModelCard.load(card, ignore_metadata_errors=True).data.get("license")
    return license_


def _texts(report: Report) -> Iterator[tuple[str, str, dict[str, float]]]:
    """Yield the title, text source and perplexities of each measurement."""
    settings = report.config.get("evaluation", {})
    for name, key in PERPLEXITIES.items():
        if found := getattr(report, name):
            yield perplexity_title(name), str(settings.get(key) or "held-out text"), found


def _results(report: Report, task: str | None) -> Iterator[EvalResult]:
    """Yield the perplexities and accuracies of the final model, as the hub reads them."""
    measured = [(text, "perplexity", found) for _, text, found in _texts(report)]
    measured += [(text, "word_perplexity", found) for text, found in (report.word_perplexity or {}).items()]
    measured += [(metric.task, metric.name, dict(metric.values)) for metric in metrics_of(report.accuracy or {})]
    for data, name, found in measured:
        value = next((found[key] for key in ("reloaded", "recovered", "compressed") if key in found), None)
        if value is not None:
            yield EvalResult(
                task_type=task or GENERATION,
                dataset_type=data,
                dataset_name=data,
                metric_type=name,
                metric_name=name,
                metric_value=round(value, 4),
            )


def _done(report: Report) -> dict[str, Any]:
    """Return the parts of the card that are read from a report."""
    of = "" if report.budget_of == "targets" else " of the whole model"
    size = (
        f"{report.removed:.1%} of {report.parameters_counted:,} parameters of {len(report.layers)} layers removed "
        f"({report.asked:.1%}{of} asked for); the whole model went from {report.model_parameters_before:,} parameters "
        f"to {report.model_parameters_after:,}."
    )
    rows = [
        (f"{title} (`{text}`)", {model: f"{value:.2f}" for model, value in found.items()})
        for title, text, found in _texts(report)
    ]
    rows += words_and_tasks(report)
    columns = list(rows[0][1]) if rows else []
    return {
        "size": size,
        "lines": list(_lines(report)),
        "left_alone": [] if report.coverage is None else _left_alone(report.coverage),
        "columns": columns,
        "results": [(title, [shown.get(column, "") for column in columns]) for title, shown in rows],
    }


def _left_alone(coverage: Coverage) -> list[tuple[str, str, str]]:
    """Return kind, number and share of the parameters that were left alone."""
    return [
        (part.what, f"{part.parameters:,}", f"{part.parameters / coverage.model_parameters:.1%}")
        for part in coverage.left_alone
    ]


def _lines(report: Report) -> Iterator[str]:
    """Yield the settings and losses of a compression."""
    config = report.config
    calibration, compression = config.get("calibration") or {}, config.get("compression") or {}
    if {"samples", "length", "text", "seed"} <= calibration.keys():
        of = "`{text}` and `{second}`" if calibration.get("second") else "`{text}`"
        more = " and {correction_samples} for corrections" if calibration.get("correction_samples") else ""
        yield f"calibration: {{samples}} windows{more} of {{length}} tokens of {of}, seed {{seed}}".format_map(
            calibration
        )
    if {"selection", "metric", "corrections"} <= compression.keys():
        preset = "preset `{preset}`: ".format_map(config) if config.get("preset") else ""
        yield preset + "selection `{selection}`, metric `{metric}`, corrections {corrections}".format_map(compression)
    if recovery := config.get("recovery"):
        yield "then the factors were trained: {method}, learning rate {lr}, loss `{loss}`".format_map(
            {"lr": "default", "loss": "own"} | recovery
        )
    if losses := report.kept_back:
        yield "loss on calibration batches kept back: {dense:.4f} before, {final:.4f} after".format_map(losses)
    if report.file_bytes:
        yield "weights on disk: {dense:,} bytes before, {compressed:,} after".format_map(report.file_bytes)
    evaluation = config.get("evaluation") or {}
    if report.perplexity and {"text", "windows", "length"} <= evaluation.keys():
        yield "perplexity over {windows} windows (0 means all) of {length} tokens".format_map(evaluation)
