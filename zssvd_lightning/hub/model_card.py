"""Model card of a compressed model: method, calibration data, results and how to load it."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from zssvd_lightning.compression.report import Report
from zssvd_lightning.model.coverage import Coverage

WORDS = {
    "low_rank": "two factors, floating point",
    "pivoted": "pivot rows and the coefficients of the others, floating point",
    "pivoted_columns": "pivot columns and the coefficients of the others, floating point",
    "int8_low_rank": "two factors, 8 bits",
    "int8": "dense, 8 bits",
}


def write_card(folder: Path, name: str, specs: Mapping[str, Mapping[str, Any]], report: Report | None) -> None:
    """Write `README.md` into the folder of a compressed model; nothing is written for a dense model.

    Args:
        folder: folder of the model.
        name: name of the model.
        specs: kind and sizes of its compressed layers, by name.
        report: report of the compression, if there is one.
    """
    if specs:
        text = "\n".join(_lines(folder, name, specs, report))
        (folder / "README.md").write_text(text + "\n", encoding="utf-8")


def _lines(folder: Path, name: str, specs: Mapping[str, Mapping[str, Any]], report: Report | None) -> Iterator[str]:
    source = None if report is None else report.config.get("model", {}).get("source")
    is_on_hub = isinstance(source, str) and re.fullmatch(r"[\w-]+/[\w.-]+", source) and not Path(source).exists()
    data = ModelCardData(
        base_model=source if is_on_hub else None, library_name="transformers", tags=["zssvd", "low-rank", "compression"]
    )
    yield f"---\n{data.to_yaml()}\n---\n\n# {name}\n"
    yield f"{source or 'A language model'}, compressed with zssvd-lightning {version('zssvd-lightning')}.\n"
    if report is not None:
        yield from _done(report)
    yield "## Layers\n"
    for kind, count in Counter(spec["kind"] for spec in specs.values()).items():
        yield f"- {count} as {WORDS.get(kind, kind)}"
    yield "\n`config.json` has the rank of each. All other layers are as they were.\n"
    yield "## Loading\n\n```python\nfrom zssvd_lightning import from_pretrained\n"
    yield "model = from_pretrained(FOLDER)\n```\n"
    yield "After `import zssvd_lightning`, the automatic classes of transformers load it as well."
    if (folder / "modeling_zssvd.py").exists():
        yield "Where it is not installed, they do with `trust_remote_code=True`."


def _done(report: Report) -> Iterator[str]:
    yield "## What was done\n"
    of = "" if report.budget_of == "targets" else " of the whole model"
    yield f"{report.removed:.1%} of {report.parameters_counted:,} parameters of {len(report.layers)} layers removed"
    yield f"({report.asked:.1%}{of} asked for); the whole model went from"
    yield f"{report.model_parameters_before:,} parameters to {report.model_parameters_after:,}.\n"
    calibration, compression = report.config.get("calibration") or {}, report.config.get("compression") or {}
    if {"samples", "length", "text", "seed"} <= calibration.keys():
        of = "`{text}` and `{second}`" if calibration.get("second") else "`{text}`"
        more = " and {correction_samples} for corrections" if calibration.get("correction_samples") else ""
        told = f"- calibration: {{samples}} windows{more} of {{length}} tokens of {of}, seed {{seed}}"
        yield told.format_map(calibration)
    if {"selection", "metric", "corrections"} <= compression.keys():
        yield "- selection `{selection}`, metric `{metric}`, corrections {corrections}".format_map(compression)
    if recovery := report.config.get("recovery"):
        yield "- then the factors were trained: {method}, learning rate {lr}, loss `{loss}`".format_map(
            {"lr": "default", "loss": "own"} | recovery
        )
    if losses := report.kept_back:
        yield "- loss on calibration batches kept back: {dense:.4f} before, {final:.4f} after".format_map(losses)
    if report.file_bytes:
        yield "- weights on disk: {dense:,} bytes before, {compressed:,} after".format_map(report.file_bytes)
    yield ""
    if report.coverage is not None:
        yield from _left_alone(report.coverage)
    yield from _perplexities(report)


def _perplexities(report: Report) -> Iterator[str]:
    texts = {"perplexity": report.perplexity, "perplexity, second text": report.perplexity_second}
    measured = {title: found for title, found in texts.items() if found}
    if measured:
        columns = list(next(iter(measured.values())))
        yield f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}"
        for title, found in measured.items():
            yield f"| {title} | {' | '.join(f'{found[column]:.2f}' for column in columns)} |"
        evaluation = report.config.get("evaluation", {})
        if {"text", "windows", "length"} <= evaluation.keys():
            yield "\nof `{text}`, {windows} windows of {length} tokens (0 means all).\n".format_map(evaluation)


def _left_alone(coverage: Coverage) -> Iterator[str]:
    yield "| left alone | parameters | of the model |\n|---|---|---|"
    for part in coverage.left_alone:
        yield f"| {part.what} | {part.parameters:,} | {part.parameters / coverage.model_parameters:.1%} |"
    yield ""
