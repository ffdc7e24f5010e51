"""Content of a report in the words of the page: names of model, method and texts, and the headline numbers."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from zssvd_lightning.app.html.layers import total
from zssvd_lightning.app.html.markup import (
    NOT_MEASURED,
    Markup,
    count,
    duration,
    element,
    missing,
    number,
    percent,
    section,
    table,
    with_noun,
    with_unit,
)
from zssvd_lightning.compression.report import Report
from zssvd_lightning.compression.report_table import PERPLEXITIES, exponential, words_and_tasks
from zssvd_lightning.evaluation.zero_shot import metrics_of

T = TypeVar("T")


FINAL = ("reloaded", "recovered", "compressed", "truncated")
"""Keys of measurements of the model as it is saved, of which the first that there is counts."""


def final(found: Mapping[str, T]) -> T | None:
    """Return the value of the model as it is saved, as far as it was measured."""
    return next((found[key] for key in FINAL if key in found), None)


@dataclass(frozen=True)
class Facts:
    """Report, and the folder it comes from."""

    report: Report
    folder: str
    """Name of the folder."""

    def setting(self, key: str) -> Any:
        """Return a setting of the run by its dotted name; None if it is not recorded."""
        value: Any = self.report.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    @property
    def model(self) -> str:
        """Model that was compressed."""
        return str(self.setting("model.source") or self.folder)

    @property
    def method(self) -> str:
        """Preset, or how the compression is composed if there is none; empty if it is not recorded."""
        parts = (self.setting(f"compression.{key}") for key in ("metric", "selection"))
        return str(self.setting("preset") or ", ".join(str(part) for part in parts if part))

    @property
    def calibration(self) -> str:
        """Calibration text."""
        texts = [self.setting(f"calibration.{key}") for key in ("text", "second")]
        return " and ".join(str(text) for text in texts if text) or "the calibration batches"

    @property
    def title(self) -> str:
        """Title of the run."""
        method = f" by {self.method}" if self.method else ""
        return f"{self.model}{method}, {percent(self.report.reached)} removed"

    @property
    def share_of_model(self) -> float:
        """Removed fraction of the parameters of the whole model."""
        before = self.report.model_parameters_before
        return (before - self.report.model_parameters_after) / before if before else math.nan

    @property
    def file_bytes(self) -> tuple[float | None, float | None]:
        """Bytes of the weights on disk, dense and compressed."""
        files = self.report.file_bytes or {}
        return files.get("dense"), files.get("compressed")

    def speed(self, key: str) -> float | None:
        """Return an entry of the measured speeds, such as `decode` (tokens per second); None if not measured."""
        return (self.report.tokens_per_second or {}).get(key)

    def text(self, name: str = "perplexity") -> str | None:
        """Return the text of one of `PERPLEXITIES`; None if there is none."""
        text = self.setting(f"evaluation.{PERPLEXITIES[name]}")
        return None if text is None else str(text)

    @property
    def windows(self) -> str:
        """Phrase that says how much of an evaluation text was read; empty if the settings do not."""
        windows, length = self.setting("evaluation.windows"), self.setting("evaluation.length")
        if not isinstance(windows, int) or not isinstance(length, int):
            return ""
        return f", {with_noun(windows, 'window') if windows else 'all windows'} of {with_noun(length, 'token')}"

    def perplexity(self, name: str = "perplexity") -> Mapping[str, float]:
        """Return one of `PERPLEXITIES` by model."""
        found: Mapping[str, float] | None = getattr(self.report, name)
        return found or {}

    def final_perplexity(self, name: str = "perplexity") -> float | None:
        """Return one of `PERPLEXITIES` of the model as it is saved, as far as it was measured."""
        return final(self.perplexity(name))

    def accuracies(self) -> dict[str, str]:
        """Return each accuracy of the model as it is saved, with its standard error, by task and metric."""
        metrics = metrics_of(self.report.accuracy or {})
        return {f"{metric.task}, {metric.name}": final(metric.shown()) or number(None) for metric in metrics}

    @property
    def seconds(self) -> float | None:
        """Seconds of all stages."""
        return sum(self.report.seconds.values()) if self.report.seconds else None


def tile(title: str, value: str, more: str = "") -> Markup:
    """Return a headline number."""
    return element("div", element("b", value), element("span", title), element("small", more), class_="tile")


def headline(facts: Facts, id_: str) -> Markup:
    """Return the section with the headline numbers."""
    report = facts.report
    dense_bytes, bytes_ = facts.file_bytes
    perplexity = facts.perplexity()
    losses = report.kept_back or {}
    before = "before" if report.compresses_again else "dense"
    tiles = [
        tile(
            f"of the {report.budget_in} of {_counted(report)} removed",
            percent(report.reached),
            f"{percent(report.asked)} asked",
        ),
        tile("of the parameters of the whole model removed", percent(facts.share_of_model)),
        tile("size on disk", with_unit(bytes_, "B"), f"{before} {with_unit(dense_bytes, 'B')}"),
        tile(
            f"perplexity on {facts.text()}" if facts.text() else "perplexity",
            number(facts.final_perplexity()),
            f"dense {number(perplexity.get('dense'))}",
        ),
        tile("loss on batches kept back (nats)", number(losses.get("final")), f"dense {number(losses.get('dense'))}"),
        tile("in all", duration(facts.seconds), f"peak memory {with_unit(report.peak_rss_bytes or None, 'B')}"),
    ]
    quality = table(["quality", "dense", "truncated", "final"], _quality(facts))
    sizes = table(["size", before, "compressed", "removed"], _sizes(facts))
    return section(
        "In numbers",
        element("div", *tiles, class_="tiles"),
        element("div", quality, sizes, class_="columns"),
        *_notes(report),
        id_=id_,
    )


def _counted(report: Report) -> str:
    return "the target layers" if report.budget_of == "targets" else "the whole model"


def _quality(facts: Facts) -> list[list[str]]:
    losses = facts.report.kept_back or {}
    kept_back = [losses.get(key) for key in ("dense", "truncated", "final")]
    batches = f", {with_noun(int(losses['batches']), 'batch')}" if "batches" in losses else ""
    rows = [
        [f"loss on batches kept back of {facts.calibration}{batches} (nats)", *map(number, kept_back)],
        ["its exponential", *(number(None if loss is None else exponential(loss)) for loss in kept_back)],
    ]
    if (judged := facts.report.held_out) is not None:
        about = f"loss on {with_noun(int(judged['batches']), 'held-out batch')} (nats), trained {_trained(judged)}"
        rows.append([about, "", *(number(judged.get(key)) for key in ("truncated", "recovered"))])
    for name in PERPLEXITIES:
        found, text = facts.perplexity(name), facts.text(name)
        if found or name == "perplexity":
            title = f"perplexity on {text}{facts.windows}" if text else "perplexity on a text"
            rows += _of_models(title, {model: number(value) for model, value in found.items()})
    for title, shown in words_and_tasks(facts.report):
        rows += _of_models(title, shown)
    return rows


def _of_models(title: str, shown: Mapping[str, str]) -> Iterator[list[str]]:
    """Yield the rows of one measurement of all models."""
    absent = number(None)
    trained = shown.get("recovered", shown.get("compressed", absent))
    yield [title, shown.get("dense", absent), shown.get("truncated", absent), trained]
    if "dense_finetuned" in shown:
        yield ["  dense model, fine-tuned as long", shown["dense_finetuned"], "", ""]
    if "reloaded" in shown:
        yield ["  as saved and loaded again", "", "", shown["reloaded"]]


def _trained(judged: Mapping[str, float]) -> str:
    """Return how many steps of the training led to the final state."""
    step, steps = int(judged["step"]), int(judged["steps"])
    return f"for {step} of {steps} steps" if step else f"for {steps} steps, which did not lower it and were undone"


def _sizes(facts: Facts) -> list[list[str]]:
    report, sums = facts.report, total(facts.report.layers.values())
    dense_bytes, bytes_ = facts.file_bytes
    rows: list[tuple[str, float | None, float | None, Callable[[Any], str]]] = [
        ("parameters of the target layers", report.parameters_before, report.parameters_after, count),
        ("parameters of the model", report.model_parameters_before, report.model_parameters_after, count),
        ("weights on disk", dense_bytes, bytes_, lambda value: with_unit(value, "B")),
        ("operations of the target layers a token", sums.dense_flops, sums.flops, lambda v: with_unit(v, "FLOP")),
    ]
    shown = [
        [name, show(dense), show(now), percent(None if not dense or now is None else 1 - now / dense)]
        for name, dense, now, show in rows
    ]
    return shown + [
        [f"{phase}, tokens per second", number(facts.speed(f"dense_{phase}")), number(speed), ""]
        for phase in ("prefill", "decode")
        if (speed := facts.speed(phase)) is not None
    ]


def _notes(report: Report) -> list[Markup]:
    """Return notes on the losses, and on what was not measured."""
    notes = []
    if report.kept_back is not None:
        about = "Batches kept back are batches of the calibration. Their loss compares the states of a run, not texts."
        notes.append(element("p", about, class_="about"))
    else:
        notes.append(missing(f"the loss on batches kept back ({NOT_MEASURED} in this run)"))
    if report.perplexity is None:
        notes.append(missing("perplexity, because the run had no evaluation text"))
    if report.accuracy is not None:
        about = "Accuracies stand beside their standard errors over the rows of the task."
        notes.append(element("p", about, class_="about"))
    return notes
