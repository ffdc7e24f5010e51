"""Sections of the page that are tables: coverage, costs, continuations, settings."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from zssvd_lightning.app.html.facts import Facts
from zssvd_lightning.app.html.layers import Sum, by_kind, bytes_of_a_parameter
from zssvd_lightning.app.html.markup import (
    Markup,
    count,
    duration,
    element,
    joined,
    missing,
    number,
    paragraph,
    percent,
    section,
    table,
    with_unit,
)
from zssvd_lightning.compression.report import Report

NAMES = 50
"""Number of layers to name where many have the same fate."""


def coverage(facts: Facts, id_: str) -> Markup:
    """Return what was compressed and what was left alone, with reasons and shares."""
    report = facts.report
    whole, sums = report.model_parameters_before, by_kind(report.layers)
    covered = report.coverage
    left = () if covered is None else covered.left_alone
    parts = [
        ("remains", "compressed layers: kept", sum(s.kept for s in _low_rank(report))),
        ("gone", "compressed layers: removed", report.parameters_before - report.parameters_after),
        ("stays", "target layers that stay as they were", sum(s.kept for s in _dense(report))),
        *(("alone", part.what, part.parameters) for part in left),
    ]
    if covered is None:
        parts.append(("alone", "other weights", whole - report.parameters_before))
    content = [_stacked([part for part in parts if part[2]], whole), _of_kinds(sums, whole)]
    if left:
        rows = [[p.what, count(p.tensors), count(p.parameters), percent(p.parameters / whole)] for p in left]
        content.append(table(["left alone", "tensors", "parameters", "of the model"], rows))
    elif covered is None:
        content.append(missing("which weights were left alone and why; an earlier release wrote it"))
    if report.left_dense:
        content.append(_not_reached(report.left_dense))
    return section("What was compressed", *content, id_=id_)


def _low_rank(report: Report) -> Iterable[Any]:
    return (layer for layer in report.layers.values() if layer.rank is not None)


def _dense(report: Report) -> Iterable[Any]:
    return (layer for layer in report.layers.values() if layer.rank is None)


def _stacked(parts: list[tuple[str, str, int]], whole: int) -> Markup:
    """Return a bar of parts, with a legend under it."""
    pieces = [
        element("span", class_=kind, style=f"flex-grow:{size}", title=f"{what}: {count(size)}")
        for kind, what, size in parts
    ]
    keys = [
        element("span", element("i", class_=f"key {kind}"), f"{what} {percent(size / whole)}")
        for kind, what, size in parts
    ]
    return joined([element("div", *pieces, class_="stacked"), element("p", *keys, class_="legend")])


def _of_kinds(sums: Mapping[str, Sum], whole: int) -> Markup:
    rows = [
        [
            kind,
            count(s.layers),
            count(s.low_rank),
            count(s.layers - s.low_rank),
            count(s.dense),
            count(s.kept),
            percent(s.dense / whole),
        ]
        for kind, s in sums.items()
    ]
    head = ["target layers", "layers", "low-rank", "stay dense", "parameters if dense", "kept", "of the model"]
    note = paragraph("A layer stays dense where no smaller rank pays: above the break-even rank, factors are larger.")
    return joined([table(head, rows), note])


def _not_reached(left_dense: Mapping[str, str]) -> Markup:
    reasons = Counter(left_dense.values())
    rows = [[reason, count(layers)] for reason, layers in reasons.most_common(NAMES)]
    names = list(left_dense)
    shown = ", ".join(names[:NAMES]) + (f" and {len(names) - NAMES} more" if len(names) > NAMES else "")
    return joined([table(["targets that calibration has not reached", "layers"], rows), paragraph(shown)])


def costs(facts: Facts, id_: str) -> Markup:
    """Return where bytes, operations and seconds went."""
    report = facts.report
    sums, each = by_kind(report.layers), bytes_of_a_parameter(report)
    if each is None:
        counts = {kind: (s.dense, s.kept) for kind, s in sums.items()}
        content = [_bars("Parameters of each kind of matrix", counts, count)]
    else:
        sizes = {kind: (s.dense * each[0], s.kept * each[1]) for kind, s in sums.items()}
        content = [_bars("Bytes of each kind of matrix on disk", sizes, lambda value: with_unit(value, "B"))]
    if any(s.flops is None for s in sums.values()):
        content.append(missing("operations of each layer; an earlier release wrote it"))
    else:
        flops = {kind: (s.dense_flops, s.flops or 0) for kind, s in sums.items()}
        content.append(_bars("Operations of a token in each kind of matrix", flops, lambda v: with_unit(v, "FLOP")))
    if report.seconds:
        stages = {stage: (None, seconds) for stage, seconds in report.seconds.items()}
        content.append(_bars(f"Time of each stage, {duration(facts.seconds)} in all", stages, duration))
    else:
        content.append(missing("the seconds of each stage"))
    return section("Where bytes, operations and time went", element("div", *content, class_="columns"), id_=id_)


def _bars(title: str, values: Mapping[str, tuple[Any, float]], show: Any) -> Markup:
    """Return horizontal bars: the second of each pair within the first, which may be None."""
    longest = max((max(dense or 0, now) for dense, now in values.values()), default=0) or 1
    rows = []
    for name, (dense, now) in values.items():
        track = [element("i", class_="now", style=f"width:{100 * now / longest:.2f}%")]
        if dense is not None:
            track.insert(0, element("i", class_="dense", style=f"width:{100 * dense / longest:.2f}%"))
        text = show(now) if dense is None else f"{show(dense)} → {show(now)}"
        rows.append(
            element(
                "div",
                element("span", name),
                element("span", text, class_="number"),
                element("div", *track, class_="track"),
            )
        )
    return element("figure", element("figcaption", title), element("div", *rows, class_="bars"))


def continuations(facts: Facts, id_: str) -> Markup | None:
    """Return the texts that both models generate; None if the run has none."""
    found = facts.report.continuations
    if not found:
        return None
    cards = [
        element("blockquote", element("b", which), element("p", found[which]))
        for which in ("dense", "compressed")
        if which in found
    ]
    how = f" ({found['how']})" if "how" in found else ""
    prompt = paragraph("Continuations of ", element("q", found.get("prompt", "")), how)
    return section("What both models write", prompt, element("div", *cards, class_="columns"), id_=id_)


def settings(facts: Facts, id_: str) -> Markup:
    """Return all settings of the run, closed at first."""
    rows = list(_flat(facts.report.config))
    if not rows:
        return section("Settings", missing("the settings of the run"), id_=id_)
    rows.append(["seed", number(facts.report.seed) if facts.report.seed is not None else "none"])
    listed = element("details", element("summary", f"{len(rows)} settings"), table(["setting", "value"], rows, 9))
    return section("Settings", listed, id_=id_)


def _flat(config: Any, name: str = "") -> Iterable[list[str]]:
    """Yield the dotted name and the value of each setting."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield from _flat(value, f"{name}.{key}" if name else str(key))
    else:
        yield [name, config if isinstance(config, str) else json.dumps(config, default=str)]
