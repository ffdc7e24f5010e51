"""Several runs side by side: a table, and quality against bytes."""

import math
from collections.abc import Callable, Sequence

from zssvd_lightning.app.html.charts import Axis, Chart, figure
from zssvd_lightning.app.html.facts import Facts
from zssvd_lightning.app.html.markup import (
    Markup,
    duration,
    element,
    missing,
    number,
    paragraph,
    percent,
    section,
    table,
    with_unit,
)

COLORS = 6
"""Number of colors of runs in the style sheet, after which they start again."""


def letter(index: int) -> str:
    """Return the name of a run in the chart: A to Z, then A2, B2 and so on."""
    return f"{chr(65 + index % 26)}{index // 26 + 1 if index >= 26 else ''}"


def comparison(runs: Sequence[Facts], id_: str) -> Markup:
    """Return the section that compares the runs."""
    head = [
        "run",
        "model",
        "method",
        "removed",
        "on disk",
        "perplexity",
        "second text",
        "loss (nats)",
        "time",
        "peak memory",
    ]
    rows = [
        [
            element("a", f"{letter(i)} {run.folder}", href=f"#run-{i}"),
            run.model,
            run.method or "not recorded",
            percent(run.report.reached),
            with_unit(run.file_bytes[1], "B"),
            number(run.final_perplexity()),
            number(run.final_perplexity(second=True)),
            number((run.report.kept_back or {}).get("final")),
            duration(run.seconds),
            with_unit(run.report.peak_rss_bytes or None, "B"),
        ]
        for i, run in enumerate(runs)
    ]
    charts = element(
        "div",
        _against_bytes(runs, "perplexity", Facts.final_perplexity, lambda run: run.perplexity().get("dense"), log=True),
        _against_bytes(
            runs,
            "loss on batches kept back (nats)",
            lambda run: (run.report.kept_back or {}).get("final"),
            lambda run: (run.report.kept_back or {}).get("dense"),
            log=False,
        ),
        class_="columns",
    )
    return section("The runs side by side", table(head, rows, numbers_from=3), *_differences(runs), charts, id_=id_)


def _against_bytes(
    runs: Sequence[Facts],
    what: str,
    quality: Callable[[Facts], float | None],
    of_dense: Callable[[Facts], float | None],
    *,
    log: bool,
) -> Markup:
    points = [(i, run.file_bytes[1], quality(run)) for i, run in enumerate(runs)]
    known = [(i, size / 1e6, q) for i, size, q in points if size and q is not None and math.isfinite(q)]
    if not known:
        return missing(f"{what} against bytes, because no run has measured both")
    dense = {(d / 1e6, q) for run in runs if (d := run.file_bytes[0]) and (q := of_dense(run)) is not None}
    dense = {(size, value) for size, value in dense if math.isfinite(value)}
    shown = [runs[i] for i, _, _ in known]
    texts = {run.text() if what == "perplexity" else run.calibration for run in shown}
    on = f" on {next(iter(texts))}" if len(texts) == 1 else ""
    title = f"{what.capitalize()}{on} against the size on disk, {', '.join(dict.fromkeys(run.model for run in shown))}"
    sizes, values = [p[1] for p in known] + [d[0] for d in dense], [p[2] for p in known] + [d[1] for d in dense]
    chart = Chart(Axis.over("weights on disk (MB)", sizes), Axis.over(what, values, log=log), title)
    for size, value in sorted(dense):
        chart.mark((size, value), "diamond dense", f"dense: {size:.4g} MB, {number(value)}")
    for i, size, value in known:
        chart.mark(
            (size, value), f"dot run-{i % COLORS}", f"{letter(i)} {runs[i].title}: {size:.4g} MB, {number(value)}"
        )
    for i, size, value in known:
        chart.note((size, value), letter(i))
    for size, value in sorted(dense):
        chart.note((size, value), "dense")
    absent = [letter(i) for i, _, _ in points if i not in {k[0] for k in known}]
    about = [f"Not in the chart, because it was not measured: {', '.join(absent)}."] if absent else []
    return figure(title, chart.drawn(), *about)


def _differences(runs: Sequence[Facts]) -> list[Markup]:
    """Return notes on why numbers of these runs may not be comparable."""
    notes = []
    for what, key in (
        ("models", "model.source"),
        ("evaluation texts", "evaluation.text"),
        ("second texts", "evaluation.second"),
        ("numbers of windows", "evaluation.windows"),
        ("lengths of windows", "evaluation.length"),
        ("calibration texts, so that losses are of other batches", "calibration.text"),
    ):
        found = list(dict.fromkeys(str(run.setting(key) or "none") for run in runs))
        if len(found) > 1:
            notes.append(paragraph(f"The runs have different {what}: {', '.join(found)}."))
    return notes
