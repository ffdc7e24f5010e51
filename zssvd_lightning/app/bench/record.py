"""Speeds of a measurement in the reports of the folders that were measured."""

import json
from pathlib import Path

from zssvd_lightning._files import json_of, replacing_file
from zssvd_lightning.app.bench.results import Results
from zssvd_lightning.app.html.page import write_page
from zssvd_lightning.compression.report import NUMBERS, REPORT, read_report
from zssvd_lightning.errors import ConfigError


def recorded(results: Results) -> list[Path]:
    """Write the speeds of the first workload into the report of each measured folder, and its page anew.

    `tokens_per_second` in `report.json` then has `prefill` and `decode` of the model, `dense_prefill` and
    `dense_decode`, and the `batch` and `context` they were measured at.

    Args:
        results: results of a measurement; models without a report are left alone.

    Returns:
        The reports that were written.

    Raises:
        SavedModelError: a report is unreadable.
        OutputError: a report or page cannot be written.
    """
    written = []
    for contender in results.contenders:
        folder = Path(contender.source)
        if not contender.dense and read_report(folder) is not None:
            path = folder / REPORT
            found = speeds(results, contender.name)
            if not found.keys() & {"prefill", "decode"}:
                continue  # it failed, so that an earlier measurement stays
            saved = json.loads(path.read_text(encoding="utf-8"))
            saved["tokens_per_second"] = found
            text = NUMBERS.sub(lambda found: " ".join(found[0].split()), json_of(saved, indent=2))
            with replacing_file(path) as file:
                file.write_text(text + "\n", encoding="utf-8")
            write_page([folder])
            written.append(path)
    return written


def refuse_no_reports(sources: list[str]) -> None:
    """Raise ConfigError if no source is a folder with a report."""
    if not any((Path(source) / REPORT).is_file() for source in sources):
        raise ConfigError(f"--record writes into {REPORT}, but no folder here has one; name output folders of compress")


def speeds(results: Results, name: str) -> dict[str, float]:
    """Return the speeds (tokens per second) of a model and of the dense one at the first workload, without failures."""
    rows = results.rows()
    batch, context = rows[0].batch, rows[0].context
    found: dict[str, float] = {"batch": batch, "context": context}
    for key, model in (("dense_", results.contenders[0].name), ("", name)):
        for row in rows:
            if (row.model, row.batch, row.context) == (model, batch, context) and row.tokens_per_second is not None:
                found[f"{key}{row.phase}"] = float(f"{row.tokens_per_second.median:.4g}")
    return found
