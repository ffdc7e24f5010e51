"""Table of a report for the terminal."""

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from zssvd_lightning.evaluation.zero_shot import metrics_of

if TYPE_CHECKING:
    from zssvd_lightning.compression.report import Report

WIDEST = 10_000
"""Columns of a terminal that are enough for any table."""

PERPLEXITIES = {"perplexity": "text", "perplexity_second": "second", "perplexity_third": "third"}
"""Fields of a report with perplexities, and the key of the text of each in the settings of the evaluation."""


def perplexity_title(name: str) -> str:
    """Return the title of one of `PERPLEXITIES`."""
    key = PERPLEXITIES[name]
    return "perplexity" if key == "text" else f"perplexity, {key} text"


def words_and_tasks(report: "Report") -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the title of each word perplexity and accuracy, and its value for every model, with its standard error."""
    for text, found in (report.word_perplexity or {}).items():
        yield f"word perplexity of {text}", _shown(found)
    for metric in metrics_of(report.accuracy or {}):
        yield metric.title, metric.shown()


def _shown(found: Mapping[str, float]) -> dict[str, str]:
    return {model: f"{value:.2f}" for model, value in found.items()}


def table_of(report: "Report", details: bool) -> Table:
    """Return a table for the terminal that compares the model before and after compression.

    Args:
        report: the report.
        details: whether to add the seconds of each step and the first-order sum.
    """
    of = "the target layers" if report.budget_of == "targets" else "the model"
    again = f", counted from the {report.ratio_of} layers" if report.compresses_again else ""
    table = Table(
        title=f"removed {report.reached:.4f} of the {report.budget_in} of {of} ({report.asked:g} asked{again})"
    )
    before = "before" if report.compresses_again else "dense"
    for column, justify in (("", "left"), (before, "right"), ("compressed", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    _add_losses(report, table)
    _add_recovery(report, table)
    _add_quality(report, table)
    _add_sizes(report, table)
    table.add_section()
    seconds = report.seconds if details else {}
    for title, value in {
        "seconds": sum(report.seconds.values()),
        **{f"  {s}": t for s, t in seconds.items()},
    }.items():
        table.add_row(title, "", f"{value:.1f}")
    if report.peak_rss_bytes:
        table.add_row("peak memory", "", f"{report.peak_rss_bytes / 1e9:.2f} GB")
    if details:
        table.add_row("first-order sum of the last truncation", "", f"{report.first_order_sum:.4g}")
    return table


def _add_losses(report: "Report", table: Table) -> None:
    """Add the loss on the batches kept back."""
    if (losses := report.kept_back) is None:
        return
    table.add_row("loss on batches kept back", f"{losses['dense']:.4f}", f"{losses['final']:.4f}")
    table.add_row("  its exponential", *(f"{exponential(losses[key]):.2f}" for key in ("dense", "final")))
    if losses["final"] != losses["truncated"]:
        table.add_row("  before corrections", "", f"{losses['truncated']:.4f}")
    if losses["taken_back"]:
        table.add_row("  steps taken back", "", f"{losses['taken_back']}")


def _add_recovery(report: "Report", table: Table) -> None:
    """Add the loss on the batches that judged the recovery."""
    if (losses := report.held_out) is None:
        return
    table.add_row("loss on held-out batches, before training", "", f"{losses['truncated']:.4f}")
    table.add_row("  after training", "", f"{losses['recovered']:.4f}")
    step, steps = int(losses["step"]), int(losses["steps"])
    kept = f"{step} of {steps}" if step else f"none of {steps}: training did not lower it"
    table.add_row("  steps to the final state", "", kept)


def _add_quality(report: "Report", table: Table) -> None:
    """Add what was measured on texts and tasks."""
    found = {perplexity_title(name): getattr(report, name) for name in PERPLEXITIES}
    perplexities = [(title, _shown(values)) for title, values in found.items() if values]
    for plain, shown in [*perplexities, *words_and_tasks(report)]:
        title = escape(plain)  # it can hold the name of a file, with brackets
        table.add_row(title, shown["dense"], shown.get("compressed", shown.get("truncated", "nan")))
        if "recovered" in shown:
            table.add_row(f"{title}, trained", shown.get("dense_finetuned", "nan"), shown["recovered"])
        if "reloaded" in shown:
            table.add_row(f"{title}, as saved", "", shown["reloaded"])


def _add_sizes(report: "Report", table: Table) -> None:
    """Add parameters, bytes, ranks and what was left alone."""
    if report.compresses_again:
        table.add_row("parameters of target layers, if dense", f"{report.parameters_dense:,}", "")
    table.add_row("parameters of target layers", f"{report.parameters_before:,}", f"{report.parameters_after:,}")
    table.add_row(
        "parameters of the model", f"{report.model_parameters_before:,}", f"{report.model_parameters_after:,}"
    )
    if report.file_bytes:
        table.add_row("file size", *(f"{report.file_bytes[k] / 1e6:.1f} MB" for k in ("dense", "compressed")))
    if report.removed_experts:
        table.add_row("experts removed", "", f"{len(report.removed_experts)}")
    if widths := [layer.units for layer in report.layers.values() if layer.units is not None]:
        left, before = map(sum, zip(*widths, strict=True))
        table.add_row("layers with fewer hidden units", "", f"{len(widths)} of {len(report.layers)}")
        table.add_row("  part of their units that is left", "", f"{left / before:.1%}")
    ranks = [layer.rank for layer in report.layers.values() if layer.rank]
    table.add_row("low-rank layers", "" if report.compresses_again else "0", f"{len(ranks)} of {len(report.layers)}")
    if ranks and report.rank_multiple > 1:
        multiples = sum(rank % report.rank_multiple == 0 for rank in ranks)
        table.add_row(f"  of a rank that is a multiple of {report.rank_multiple}", "", f"{multiples} of {len(ranks)}")
    if report.coverage is not None:
        table.add_section()
        for part in report.coverage.left_alone:
            table.add_row(f"left alone: {part.what}", f"{part.parameters:,}", f"{part.parameters:,}")


def exponential(loss: float) -> float:
    """Return e^loss, which is the perplexity of a language model; infinity where it overflows."""
    return math.exp(loss) if loss < 700 else math.inf
