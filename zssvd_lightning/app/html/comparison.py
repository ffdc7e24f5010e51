"""Several runs side by side: a table, and quality against bytes and against speed."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

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


class Cost(NamedTuple):
    """Quantity against which quality is drawn."""

    title: str
    axis: str
    unit: str
    of: Callable[[Facts], tuple[float | None, float | None]]
    """Function that returns the values of the dense and of the compressed model; None where not measured."""


BYTES = Cost(
    "the size on disk", "weights on disk (MB)", "MB", lambda run: (_mega(run.file_bytes[0]), _mega(run.file_bytes[1]))
)


SPEED = Cost(
    "speed", "decode, tokens per second", "tokens/s", lambda run: (run.speed("dense_decode"), run.speed("decode"))
)


def _mega(size: float | None) -> float | None:
    return size / 1e6 if size else None


def letter(index: int) -> str:
    """Return the name of a run in the chart: A to Z, then A2, B2 and so on."""
    return f"{chr(65 + index % 26)}{index // 26 + 1 if index >= 26 else ''}"


def comparison(runs: Sequence[Facts], id_: str) -> Markup:
    """Return the section that compares the runs."""
    third = any(run.perplexity("perplexity_third") for run in runs)
    tasks = list(dict.fromkeys(name for run in runs for name in run.accuracies()))
    head = [
        "run",
        "model",
        "method",
        "removed",
        "on disk",
        "decode, tokens/s",
        "perplexity",
        "second text",
        *(["third text"] if third else []),
        *tasks,
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
            number(run.speed("decode")),
            number(run.final_perplexity()),
            number(run.final_perplexity("perplexity_second")),
            *([number(run.final_perplexity("perplexity_third"))] if third else []),
            *(run.accuracies().get(name, number(None)) for name in tasks),
            number((run.report.kept_back or {}).get("final")),
            duration(run.seconds),
            with_unit(run.report.peak_rss_bytes or None, "B"),
        ]
        for i, run in enumerate(runs)
    ]
    drawn = []
    for cost in (BYTES, SPEED):
        dense = (lambda run: run.perplexity().get("dense"), lambda run: (run.report.kept_back or {}).get("dense"))
        drawn.append(_against(cost, runs, "perplexity", Facts.final_perplexity, dense[0], log=True))
        loss, of_loss = "loss on batches kept back (nats)", lambda run: (run.report.kept_back or {}).get("final")
        drawn.append(_against(cost, runs, loss, of_loss, dense[1], log=False))
    charts = element("div", *drawn, class_="columns")
    return section("The runs side by side", table(head, rows, numbers_from=3), *_differences(runs), charts, id_=id_)


def _against(
    cost: Cost,
    runs: Sequence[Facts],
    what: str,
    quality: Callable[[Facts], float | None],
    of_dense: Callable[[Facts], float | None],
    *,
    log: bool,
) -> Markup:
    points = [(i, cost.of(run)[1], quality(run)) for i, run in enumerate(runs)]
    known = [(i, size, q) for i, size, q in points if size and q is not None and math.isfinite(q)]
    if not known:
        how = "; zssvd bench DIR... --record measures speeds" if cost is SPEED else ""
        return missing(f"{what} against {cost.title}, because no run has measured both{how}")
    dense = {(d, q) for run in runs if (d := cost.of(run)[0]) and (q := of_dense(run)) is not None}
    dense = {(size, value) for size, value in dense if math.isfinite(value)}
    shown = [runs[i] for i, _, _ in known]
    texts = {run.text() if what == "perplexity" else run.calibration for run in shown}
    on = f" on {next(iter(texts))}" if len(texts) == 1 and None not in texts else ""
    title = f"{what.capitalize()}{on} against {cost.title}, {', '.join(dict.fromkeys(run.model for run in shown))}"
    sizes, values = [p[1] for p in known] + [d[0] for d in dense], [p[2] for p in known] + [d[1] for d in dense]
    chart = Chart(Axis.over(cost.axis, sizes), Axis.over(what, values, log=log), title)
    for size, value in sorted(dense):
        chart.mark((size, value), "diamond dense", f"dense: {size:.4g} {cost.unit}, {number(value)}")
    for i, size, value in known:
        chart.mark(
            (size, value),
            f"dot run-{i % COLORS}",
            f"{letter(i)} {runs[i].title}: {size:.4g} {cost.unit}, {number(value)}",
        )
    for i, size, value in known:
        chart.note((size, value), letter(i))
    for size, value in sorted(dense):
        chart.note((size, value), "dense")
    absent = [letter(i) for i, _, _ in points if i not in {k[0] for k in known}]
    about = ["Speeds compare where one run of zssvd bench measured them."] if cost is SPEED else []
    about += [f"Not in the chart, because it was not measured: {', '.join(absent)}."] if absent else []
    return figure(title, chart.drawn(), *about)


def _differences(runs: Sequence[Facts]) -> list[Markup]:
    """Return notes on why numbers of these runs may not be comparable."""
    notes = []
    for what, key in (
        ("models", "model.source"),
        ("evaluation texts", "evaluation.text"),
        ("second texts", "evaluation.second"),
        ("third texts", "evaluation.third"),
        ("numbers of rows of each task", "evaluation.limit"),
        ("numbers of windows", "evaluation.windows"),
        ("lengths of windows", "evaluation.length"),
        ("calibration texts, so that losses are of other batches", "calibration.text"),
    ):
        found = list(dict.fromkeys(str(run.setting(key) or "none") for run in runs))
        if len(found) > 1:
            notes.append(paragraph(f"The runs have different {what}: {', '.join(found)}."))
    works = {(run.speed("batch"), run.speed("context")) for run in runs if run.report.tokens_per_second}
    if len(works) > 1:
        notes.append(paragraph("Speeds were measured at different batches or contexts."))
    return notes
