"""Table of a report for the terminal."""

import math
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from zssvd_lightning.compression.report import Report


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
    _add_perplexities(report, table)
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


def _add_perplexities(report: "Report", table: Table) -> None:
    for title, pair in (("perplexity", report.perplexity), ("perplexity, second text", report.perplexity_second)):
        if pair:
            compressed = pair.get("compressed", pair.get("truncated", math.nan))
            table.add_row(title, f"{pair['dense']:.2f}", f"{compressed:.2f}")
            if "recovered" in pair:
                finetuned = pair.get("dense_finetuned", math.nan)
                table.add_row(f"{title}, trained", f"{finetuned:.2f}", f"{pair['recovered']:.2f}")
            if "reloaded" in pair:
                table.add_row(f"{title}, as saved", "", f"{pair['reloaded']:.2f}")


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
