"""Results of a measurement: JSON, Markdown, and a table for a terminal."""

import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from zssvd_lightning.app.bench.counts import weight_bytes
from zssvd_lightning.app.bench.models import Contender
from zssvd_lightning.app.bench.runner import Outcome
from zssvd_lightning.app.bench.session import DECODE, PREFILL
from zssvd_lightning.app.bench.settings import BenchSettings
from zssvd_lightning.app.bench.timing import Quartiles
from zssvd_lightning.app.compare.cell import versions

WHERE = ("phase", "batch", "context")
"""Titles of the columns that say what was run."""

HEADER = ("model", "tokens/s (quartiles)", "time", "bytes", "FLOPs", "time / limit", "peak MB")
"""Titles of the other columns."""

LIMIT = {PREFILL: "FLOPs", DECODE: "bytes"}
"""Quantity that bounds the time of each phase from below, as a share of what the dense model needs."""

DIGITS = 100
"""Number from which speeds are shown without decimals."""

CAPTION = (
    "All models take turns; tokens/s are medians over the rounds, with quartiles. time, bytes and FLOPs: over those of "
    "dense, time as the median of the ratios of each round. bytes: weights, and in decode the cache, that are read. "
    "time / limit: in decode, time over bytes; in prefill, time over FLOPs; at 1.00 a model is as near to its limit as "
    "dense is. peak MB: weights, and the most that cache and activations of a round add."
)


@dataclass(frozen=True)
class Row:
    """Measurements of one phase of one model at one workload. Ratios are None where the dense model failed."""

    model: str
    phase: str
    batch: int
    context: int
    how: str
    """Mode: eager, a CUDA graph or `torch.compile`."""
    rounds: int
    tokens_per_second: Quartiles | None
    seconds: tuple[float, ...]
    """Seconds of every round."""
    flops_per_token: float | None
    bytes_read: int | None
    """Bytes of weights and, in decode, cache that a pass reads."""
    peak_bytes: int | None
    time_over_dense: Quartiles | None = None
    bytes_over_dense: float | None = None
    flops_over_dense: float | None = None
    time_over_limit: float | None = None
    error: str | None = None

    @property
    def limit(self) -> float | None:
        """Time over dense that the phase cannot fall below if it is bound as the dense model is."""
        return self.flops_over_dense if self.phase == PREFILL else self.bytes_over_dense


@dataclass(frozen=True)
class Results:
    """Measurements of one run."""

    contenders: Sequence[Contender]
    settings: BenchSettings
    outcomes: Sequence[Outcome]
    notes: Sequence[str]

    def rows(self) -> list[Row]:
        """Return the rows by phase within each workload, the dense model first."""
        found: list[Row] = []
        for work in dict.fromkeys(outcome.work for outcome in self.outcomes):
            for phase in (PREFILL, DECODE):
                rows = [self._row(each, phase) for each in self.outcomes if each.work == work and _tells(each, phase)]
                dense = next((row for row in rows if row.model == self.contenders[0].name), None)
                found += [_beside(row, dense) for row in rows]
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return plain types."""
        dense = self._weights[self.contenders[0].name]
        return {
            "settings": asdict(self.settings),
            "machine": machine(self.settings.device),
            "versions": versions(),
            "notes": list(self.notes),
            "models": [
                {
                    "name": each.name,
                    "source": each.source,
                    "dense": each.dense,
                    "weight_bytes": self._weights[each.name],
                    "weight_bytes_over_dense": self._weights[each.name] / dense,
                }
                for each in self.contenders
            ],
            "rows": [
                asdict(row) | {key: value._asdict() for key, value in vars(row).items() if isinstance(value, Quartiles)}
                for row in self.rows()
            ],
        }

    def table(self) -> Table:
        """Return the table for a terminal, in sections by phase, batch and context."""
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=Text(self._caption(), style="table.caption"))
        for number, title in enumerate(HEADER):
            table.add_column(Text(title), justify="right" if number else "left", overflow="fold")
        before = None
        for where, line in self._lines():
            if where != before:
                table.add_section()
                table.add_row(Text("{}, {} x {}".format(*where), style="bold"))
            table.add_row(*map(Text, line))
            before = where
        return table

    def markdown(self) -> str:
        """Return a Markdown table, with a caption, the machine and the versions."""
        rule = ["---", "---:", "---:", "---", *["---:"] * (len(HEADER) - 1)]
        lines = [(*where, *line) for where, line in self._lines()]
        table = [f"| {' | '.join(line)} |" for line in ((*WHERE, *HEADER), rule, *lines)]
        told = [f"{key} {value}" for key, value in (machine(self.settings.device) | versions()).items()]
        sources = [f"`{each.name}`: `{each.source}`" for each in self.contenders]
        return "\n".join([*table, "", self._caption(), "", "; ".join(sources) + ".", "", "; ".join(told) + ".", ""])

    def _caption(self) -> str:
        settings = self.settings
        how = " and ".join(dict.fromkeys(outcome.how for outcome in self.outcomes))
        ran = f"{settings.dtype} on {settings.device}; decode: {how}, {settings.tokens} steps in each round."
        weights = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in self._weights.items())
        return " ".join([CAPTION, ran, f"MB of weights: {weights}.", *(f"Note: {note}." for note in self.notes)])

    @cached_property
    def _weights(self) -> dict[str, int]:
        return {each.name: weight_bytes(each.model) for each in self.contenders}

    def _row(self, outcome: Outcome, phase: str) -> Row:
        work, seconds, flops = outcome.work, outcome.seconds.get(phase, []), outcome.flops.get(phase)
        step = work.batch * (1 if phase == DECODE else work.context or 1)  # tokens of a pass through the model
        tokens = step * (work.tokens if phase == DECODE else 1)
        return Row(
            model=outcome.name,
            phase=phase,
            batch=work.batch,
            context=work.context,
            how=outcome.how if phase == DECODE else "torch.compile" if self.settings.compiled else "eager",
            rounds=len(seconds),
            tokens_per_second=Quartiles.of([tokens / each for each in seconds]) if seconds else None,
            seconds=tuple(seconds),
            flops_per_token=None if flops is None else flops / step,
            bytes_read=outcome.bytes.get(phase),
            peak_bytes=None if outcome.risen is None else self._weights[outcome.name] + outcome.risen,
            error=outcome.error,
        )

    def _lines(self) -> Iterator[tuple[tuple[str, ...], list[str]]]:
        """Yield phase, batch and context of each row, and its entries."""
        for row in self.rows():
            where = (row.phase, str(row.batch), str(row.context or "image"))
            yield where, [row.model, *(_entries(row) if row.error is None else [row.error, *[""] * (len(HEADER) - 2)])]


def _entries(row: Row) -> list[str]:
    """Return the entries of a measured row behind the name of the model."""
    speed = "" if row.tokens_per_second is None else "{} ({}-{})".format(*map(_shortened, row.tokens_per_second))
    time = None if row.time_over_dense is None else row.time_over_dense.median
    ratios = [time, row.bytes_over_dense, row.flops_over_dense, row.time_over_limit]
    peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f}"
    return [speed, *("" if each is None else f"{each:.2f}" for each in ratios), peak]


def _shortened(value: float) -> str:
    return f"{value:.0f}" if value >= DIGITS else f"{value:.1f}"


def _tells(outcome: Outcome, phase: str) -> bool:
    """Return True if an outcome has a row for a phase. One that never began has its error at the prefill."""
    return phase in outcome.flops or (phase == PREFILL and outcome.error is not None)


def machine(device: str) -> dict[str, Any]:
    """Return the name of the processor or GPU, and the number of threads."""
    if torch.device(device).type == "cuda":
        return {"device": torch.cuda.get_device_name(device)}
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return {"device": name, "threads": torch.get_num_threads()}


def _beside(row: Row, dense: Row | None) -> Row:
    """Return a row with its ratios to that of the dense model, as far as both were measured."""
    if dense is None or None in (row.flops_per_token, row.bytes_read, dense.flops_per_token, dense.bytes_read):
        return row
    row = replace(
        row,
        bytes_over_dense=_ratio(row.bytes_read, dense.bytes_read),
        flops_over_dense=_ratio(row.flops_per_token, dense.flops_per_token),
    )
    pairs = list(zip(row.seconds, dense.seconds, strict=False))  # the rounds that both have finished
    if not pairs or row.limit is None:
        return row
    over = Quartiles.of([mine / theirs for mine, theirs in pairs])
    return replace(row, time_over_dense=over, time_over_limit=over.median / row.limit)


def _ratio(mine: float | None, theirs: float | None) -> float | None:
    return None if mine is None or not theirs else mine / theirs
