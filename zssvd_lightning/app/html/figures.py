"""Charts of one run: the walk of the selection, the sensitivities, and the loss of each state."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from zssvd_lightning.app.html.charts import Axis, Chart, figure, label
from zssvd_lightning.app.html.facts import Facts
from zssvd_lightning.app.html.markup import Markup, count, element, missing, number, section, table, with_noun

EARLIER = "an earlier release wrote it"


def choice(facts: Facts, id_: str) -> Markup:
    """Return the section with the walk and the histogram of the sensitivities."""
    trace = facts.report.trace
    if trace is None:
        content = missing(f"the running sum of the selection and the sensitivities; {EARLIER}")
        return section("How components were chosen", content, id_=id_)
    content = element("div", _walk(facts, trace["walk"]), _histogram(facts, trace["sensitivities"]), class_="columns")
    return section("How components were chosen", content, id_=id_)


def _walk(facts: Facts, walk: Mapping[str, Any] | None) -> Markup:
    if walk is None or not walk["removals"]:
        rule = facts.setting("compression.selection")
        named = f"rule {rule}" if rule else "rule of this run"
        return missing(f"a running sum over removals, because the {named} chooses all ranks at once or records none")
    title = f"Running sum of the predicted changes of the loss, {facts.model}, {facts.calibration}"
    removals = [min((index + 0.5) * walk["stride"], walk["removals"]) for index in range(len(walk["lowest"]))]
    lowest, highest = (
        list(zip(removals, walk["lowest"], strict=True)),
        list(zip(removals, walk["highest"], strict=True)),
    )
    y = Axis.over("sum of sensitivities (nats)", [*walk["lowest"], *walk["highest"], 0.0])
    chart = Chart(Axis("components dropped so far", 0, walk["removals"]), y, title)
    chart.line([(0, 0), (walk["removals"], 0)], "zero")
    if walk["stride"] > 1:
        chart.band(lowest, highest, "walk")
    chart.line(lowest, "walk")
    chart.line(highest, "walk")
    within = max(map(abs, (*walk["lowest"], *walk["highest"])))
    about = (
        f"The sizes of {with_noun(walk['removals'], 'predicted change')} add up to {number(walk['length'])} nats. With "
        f"their signs, the sum stays within ±{number(within)} and ends at {number(walk['total'])}. Layers that "
        "stay dense in the end are in it too."
    )
    return figure(title, chart.drawn(), about)


def _histogram(facts: Facts, found: Mapping[str, Any] | None) -> Markup:
    if found is None:
        return missing("sensitivities, because all of them are 0")
    title = f"Sensitivities of all components, {facts.model}, {facts.calibration}"
    edges, bins = found["edges"], len(found["kept"])
    places = [index for index in range(bins + 1) if abs(index - bins / 2) % 4 == 0.5 % 4 or index in (0, bins)]
    ticks = [(float(index), label(float(f"{edges[index]:.1g}"))) for index in places]
    highest = max(kept + dropped for kept, dropped in zip(found["kept"], found["dropped"], strict=True))
    chart = Chart(
        Axis("predicted change of the loss by dropping it (nats)", 0, bins, ticks=ticks),
        Axis("components", 0, 1.05 * highest),
        title,
    )
    for index, (kept, dropped) in enumerate(zip(found["kept"], found["dropped"], strict=True)):
        hint = f"{label(edges[index])} to {label(edges[index + 1])} nats: {count(kept)} kept, {count(dropped)} dropped"
        if dropped:
            chart.bar(index + 0.06, index + 0.94, 0, dropped, "dropped", hint)
        if kept:
            chart.bar(index + 0.06, index + 0.94, dropped, dropped + kept, "kept", hint)
    about = (
        f"The scale is logarithmic to both sides; the bin in the middle holds all below {label(edges[bins // 2 + 1])}."
    )
    return figure(title, chart.drawn(), about, legend=(("dropped", "dropped"), ("kept", "kept")))


def course(facts: Facts, id_: str) -> Markup:
    """Return the section with the loss of each state against its prediction."""
    title, trace = "Measured against predicted loss", facts.report.trace
    if trace is None:
        return section(title, missing(f"the loss after each truncation and step; {EARLIER}"), id_=id_)
    dense = (facts.report.kept_back or {}).get("dense")
    if dense is None or not trace["states"]:
        return section(title, missing("losses on batches kept back, which were not measured"), id_=id_)
    states = _predicted(trace["states"], dense)
    return section(
        title, element("div", _losses(facts, states, dense), _states(states, dense), class_="columns"), id_=id_
    )


def _predicted(states: Sequence[Mapping[str, Any]], dense: float) -> list[dict[str, Any]]:
    """Return the states with the losses that were predicted from the state before, to first and to second order."""
    before, found = dense, []
    for state in states:
        predicted = {
            key: None
            if state[key] is None
            else before + state[key] + (state["first_order"] or 0.0) * (key != "first_order")
            for key in ("first_order", "second_order")
        }
        found.append({**state, **predicted})
        known = [v for v in (state["loss"], predicted["second_order"], predicted["first_order"]) if v is not None]
        if known and not state["taken_back"]:
            before = known[0]
    return found


def _losses(facts: Facts, states: Sequence[Mapping[str, Any]], dense: float) -> Markup:
    title = f"Loss on batches kept back of {facts.calibration}, {facts.model}"
    values = [dense, *(state[key] for state in states for key in ("loss", "first_order", "second_order"))]
    shown = [value for value in values if value is not None and math.isfinite(value)]
    numbers = range(len(states) + 1)
    step = -(-len(numbers) // 12)
    ticks = [(float(index), "dense" if index == 0 else str(index)) for index in numbers[::step]]
    chart = Chart(
        Axis("state: after each truncation and step", -0.5, len(states) + 0.5, ticks=ticks),
        Axis.over("loss (nats)", shown),
        title,
    )
    kept = [(i, s["loss"]) for i, s in enumerate(states, 1) if s["loss"] is not None and not s["taken_back"]]
    chart.line([(0, dense), *kept], "measured")
    chart.mark((0, dense), "dot measured", f"dense: {number(dense)}")
    final = min((loss for _, loss in kept), default=math.nan)
    for index, state in enumerate(states, 1):
        loss, name = state["loss"], f"{state['kind']} {index}"
        for key in ("first_order", "second_order"):
            if state[key] is not None:
                chart.mark((index, state[key]), f"diamond {key}", f"{name}, predicted: {number(state[key])}")
        if loss is None:
            continue
        if state["taken_back"]:
            chart.mark((index, loss), "cross back", f"{name}: {number(loss)}, taken back")
        else:
            chart.mark((index, loss), "dot measured", f"{name}: {number(loss)}")
            if loss == final:
                chart.mark((index, loss), "ring final", f"{name}: {number(loss)}, the final model")
                final = math.nan
    legend = [("measured", "measured"), ("final", "final model")]
    legend += [("first_order", "predicted, first order")] if any(s["first_order"] is not None for s in states) else []
    legend += [("second_order", "predicted, both orders")] if any(s["second_order"] is not None for s in states) else []
    legend += [("back", "taken back")] if any(s["taken_back"] for s in states) else []
    about = (
        "A prediction is of a truncation: the loss of the state before it and the sum of the dropped sensitivities "
        "(first order), and half the curvature along the dropped components in addition (both orders)."
    )
    return figure(title, chart.drawn(), about, legend=legend)


def _states(states: Sequence[Mapping[str, Any]], dense: float) -> Markup:
    columns = {"first_order": "predicted, first order", "second_order": "predicted, both orders"}
    columns = {key: title for key, title in columns.items() if any(state[key] is not None for state in states)}
    rows = [["dense", number(dense), *["" for _ in columns], ""]]
    for index, state in enumerate(states, 1):
        predicted = ["" if state[key] is None else number(state[key]) for key in columns]
        rows.append(
            [
                f"{index}: {state['kind']}",
                number(state["loss"]),
                *predicted,
                "taken back" if state["taken_back"] else "",
            ]
        )
    return table(["state", "loss (nats)", *columns.values(), ""], rows)
