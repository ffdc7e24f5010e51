"""Results of a comparison: means over seeds, as JSON, Markdown and a table for a terminal."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from textwrap import shorten
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from zssvd_lightning._files import replacing_file
from zssvd_lightning.app.compare.arguments import Cell, Comparison
from zssvd_lightning.app.compare.cell import versions
from zssvd_lightning.app.compare.picture import Curve, draw
from zssvd_lightning.compression.report_table import PERPLEXITIES, perplexity_title
from zssvd_lightning.evaluation.zero_shot import STDERR

NAMES = JSON, MARKDOWN, PICTURE = "compare.json", "compare.md", "compare.png"


TITLES = {name: perplexity_title(name) for name in PERPLEXITIES} | {"peak_rss_bytes": "peak RSS (GB)"}
"""Titles of the measures whose title differs from their name."""


LARGE = 1e6
"""Threshold from which a number is shown with an exponent."""


LONGEST = 40
"""Maximum number of characters of an entry in the table for a terminal."""


TASK = "accuracy/"
"""Prefix of the name of a task's accuracy."""


WORDS = "word perplexity, "
"""Prefix of the name of the word perplexity on a text."""


QUALITY = (TASK, WORDS, "perplexity")
"""Prefixes of the names of measures of the quality of a model."""


class Spread(NamedTuple):
    """Mean and deviation of a measure over seeds."""

    mean: float
    deviation: float | None
    """Sample standard deviation; None for a single seed."""

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Compute the spread of one or more values."""
        return cls(mean(values), stdev(values) if len(values) > 1 else None)  # uses fractions, so no overflow


class Row(NamedTuple):
    """Row of the table: one preset at one prune ratio, over the seeds that did not fail."""

    preset: str
    prune_ratio: float
    seeds: list[int]
    measures: dict[str, Spread]
    """Spread of each measure, by name; for peak memory, `mean` is the largest value instead."""


@dataclass(frozen=True)
class Results:
    """Results of all cells of a comparison."""

    comparison: Comparison
    dense: Mapping[str, Any]
    """Measurements of the dense model, or an `error`."""
    cells: Mapping[Cell, Mapping[str, Any]]

    @property
    def errors(self) -> dict[str, str]:
        """Errors that ended the failed cells, by cell name."""
        found = {"dense": self.dense, **{cell.name: result for cell, result in self.cells.items()}}
        return {name: result["error"] for name, result in found.items() if "error" in result}

    def rows(self) -> list[Row]:
        """Return the rows in the order of the table; rows whose seeds all failed are left out."""
        groups: dict[tuple[str, float], dict[int, dict[str, float]]] = {}
        for cell, result in self.cells.items():
            if "error" not in result:
                groups.setdefault(cell[:2], {})[cell.seed] = measures(result)
        return [
            Row(*key, list(found), {name: _over_seeds(name, found.values()) for name in next(iter(found.values()))})
            for key, found in groups.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return plain types under the keys of `compare.json`; the output folder is not included."""
        settings = asdict(self.comparison.config)
        del settings["output"]
        return {
            "settings": settings,
            "versions": versions(),
            "dense": self.dense,
            "rows": [
                row._asdict() | {"measures": {name: spread._asdict() for name, spread in row.measures.items()}}
                for row in self.rows()
            ],
            "cells": [cell._asdict() | dict(result) for cell, result in self.cells.items()],
        }

    def markdown(self) -> str:
        """Return a Markdown table, with a caption under it."""
        header, *lines = self._lines()
        rule = ["---", "---:"] + ["---:"] * (len(header) - 2)
        table = [
            f"| {' | '.join(entry.replace('|', chr(92) + '|') for entry in line)} |" for line in (header, rule, *lines)
        ]
        return "\n".join([*table, "", self._caption(), ""])

    def table(self) -> Table:
        """Return the table for a terminal, with shortened errors."""
        header, *lines = self._lines()
        table = Table(  # entries are Text, because brackets in a plain string are markup
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            title=Text(self.comparison.dense.model.source, style="table.title"),
            caption=Text(self._caption(), style="table.caption"),
        )
        for number, title in enumerate(header):
            table.add_column(Text(title), justify="left" if number == 0 else "right", overflow="fold")
        for line in lines:
            table.add_row(*(Text(shorten(entry, LONGEST, placeholder=" …")) for entry in line))
        return table

    def curves(self) -> dict[str, list[Curve]]:
        """Return, for each text, curves of perplexity against the fraction kept, one for each preset."""
        found: dict[str, list[Curve]] = {}
        for name in PERPLEXITIES:
            rows = [row for row in self.rows() if name in row.measures]
            if rows:
                dense = self.dense.get(name)
                found[TITLES.get(name, name)] = [
                    Curve(
                        preset,
                        [1 - row.measures["reached"].mean for row in rows if row.preset == preset],
                        [row.measures[name].mean for row in rows if row.preset == preset],
                        [row.measures[name].deviation or 0.0 for row in rows if row.preset == preset],
                        dense,
                    )
                    for preset in dict.fromkeys(row.preset for row in rows)
                ]
        return found

    def _lines(self) -> Iterator[list[str]]:
        """Yield the lines of the table, starting with the header."""
        rows = {(row.preset, row.prune_ratio): row for row in self.rows()}
        dense = {name: Spread(value, None) for name, value in measures(self.dense).items()}
        every = [dense, *(row.measures for row in rows.values())]
        texts_and_tasks = [n for found in every for n in found if n.startswith(QUALITY) and not n.endswith(STDERR)]
        names = list(dict.fromkeys([*texts_and_tasks, "reached", "seconds", "peak_rss_bytes"]))
        yield ["preset", "pruned", *(TITLES.get(name, name.removeprefix(TASK)) for name in names)]
        error = self.dense.get("error")
        yield ["dense", "0", *([error] if error else _entries(dense, names)), *[""] * (len(names) - 1 if error else 0)]
        for preset, prune_ratio in dict.fromkeys(cell[:2] for cell in self.cells):
            if row := rows.get((preset, prune_ratio)):
                yield [preset, f"{prune_ratio}", *_entries(row.measures, names)]
            for cell, result in self.cells.items():
                if cell[:2] == (preset, prune_ratio) and "error" in result:
                    yield [preset, f"{prune_ratio}, seed {cell.seed}", result["error"], *[""] * (len(names) - 1)]

    def _caption(self) -> str:
        config, evaluation = self.comparison.config, self.comparison.dense.evaluation
        seeds = ", ".join(map(str, config.seeds))
        several = len(config.seeds) > 1
        parts = [f"Mean ± sample standard deviation over calibration seeds {seeds}" if several else f"Seed {seeds}"]
        if evaluation is not None and evaluation.texts:
            which = " and ".join(f"`{text}`" for text in evaluation.texts.values())
            count = f"{evaluation.windows} windows" if evaluation.windows else "all windows"
            parts.append(f"Perplexity on {which}, {count} of {evaluation.length} tokens")
        if evaluation is not None and evaluation.tasks:
            which = "all rows" if evaluation.limit is None else f"the first {evaluation.limit} rows"
            parts.append(f"Accuracy on {which} of each task, with the standard error over rows in parentheses")
        parts.append("Seconds and peak RSS are of calibration and compression, without evaluation")
        return ". ".join(parts) + "."


def measures(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of one cell that the table shows, by name.

    The accuracy of a task is its metric `acc`, or its first metric if it has no `acc`. Its standard error, if there is
    one, has its name with `STDERR` at the end.
    """
    found = {name: result[name] for name in PERPLEXITIES if name in result}
    found |= {WORDS + text: value for text, value in result.get("word_perplexity", {}).items()}
    for task, scores in result.get("accuracy", {}).items():
        metrics = [metric for metric in scores if metric != "rows" and not metric.endswith(STDERR)]
        metric = "acc" if "acc" in metrics else metrics[0]
        found[TASK + task] = scores[metric]
        if metric + STDERR in scores:
            found[TASK + task + STDERR] = scores[metric + STDERR]
    if "seconds" in result:
        found["reached"] = result["reached"]
        found["seconds"] = sum(result["seconds"].values())
        found["peak_rss_bytes"] = result["peak_rss_bytes"]
    return found


def write_results(folder: Path, results: Results) -> None:
    """Write `compare.json`, `compare.md` and, if matplotlib is installed, `compare.png`.

    Raises:
        OutputError: a file cannot be written.
    """
    with replacing_file(folder / JSON) as file:
        file.write_text(json.dumps(results.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    with replacing_file(folder / MARKDOWN) as file:
        file.write_text(results.markdown(), encoding="utf-8")
    model, evaluation = results.comparison.dense.model.source, results.comparison.dense.evaluation
    texts = [] if evaluation is None else list(evaluation.texts.values())
    if not draw(results.curves(), folder / PICTURE, ": ".join([model, *([", ".join(texts)] if texts else [])])):
        (folder / PICTURE).unlink(missing_ok=True)  # from earlier results


def _over_seeds(name: str, found: Iterable[Mapping[str, float]]) -> Spread:
    values = [each[name] for each in found]
    return Spread(max(values), None) if name == "peak_rss_bytes" else Spread.of(values)


def _entries(found: Mapping[str, Spread], names: Sequence[str]) -> list[str]:
    return [_entry(name, found[name], found.get(name + STDERR)) if name in found else "" for name in names]


def _entry(name: str, spread: Spread, error: Spread | None) -> str:
    """Return a measure with its deviation over seeds and, in parentheses, the mean of its standard errors."""
    if name == "peak_rss_bytes":
        return f"{spread.mean / 1e9:.2f}"
    digits = 0 if name == "seconds" else 2 if name.startswith((WORDS, "perplexity")) else 3
    form = f".{digits}{'e' if spread.mean >= LARGE else 'f'}"
    shows_spread = spread.deviation is not None and name.startswith(QUALITY)
    deviation = f" ± {spread.deviation:{form}}" if shows_spread else ""
    return f"{spread.mean:{form}}{deviation}" + ("" if error is None else f" ({error.mean:{form}})")
