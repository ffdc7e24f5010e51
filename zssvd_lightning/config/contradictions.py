"""Checks of a `CompressionConfig` for settings that exclude each other."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from zssvd_lightning.errors import ContradictionError
from zssvd_lightning.selection.rules import RULES
from zssvd_lightning.selection.storages import STORAGES
from zssvd_lightning.whitening.metrics import METRICS

if TYPE_CHECKING:
    from zssvd_lightning.config.compression import CompressionConfig


def refuse_contradictions(config: "CompressionConfig") -> None:
    """Raise ContradictionError if settings of budget, plan, correction or storage exclude each other."""
    if config.budget_of == "model" and config.budget_in == "flops":
        raise ContradictionError(
            "budget_of 'model' needs budget_in 'parameters' or 'bytes', because the FLOPs of other layers than "
            "targets are not known"
        )
    if config.truncations > 1 and config.plan is not None:
        raise ContradictionError(f"a plan is reached by one truncation, and truncations is {config.truncations}")
    if config.truncations > 1 and config.corrections and config.refits:
        raise ContradictionError(
            f"a refit keeps the ranks of the first truncation, but truncations is {config.truncations}; set it to 1"
        )
    if config.budget_in == "bytes" and config.weighs_rows:
        raise ContradictionError(
            "rows_in_16_bits 'loss_aware' also stores the order of the rows, which a budget in bytes does not "
            "count; keep the 'last' rows, or set budget_in to 'parameters'"
        )


def refuse_unable(config: "CompressionConfig", measures: str) -> None:
    """Raise ContradictionError if metric, rule or storage lack what another setting needs.

    Args:
        config: the settings.
        measures: names of the metrics that measure the loss.
    """
    metric, rule, form = config.metric_used, config.rule, config.form
    if config.correction.needs_loss_metric and not metric.measures_loss:
        raise ContradictionError(
            f"correction_step {config.correction_step!r} needs metric {measures}, but metric is {config.metric!r}"
        )
    if config.reestimate and not (metric.measures_loss and rule.uses_curvature):
        raise ContradictionError(
            f"reestimate needs metric {measures} and selection "
            f"{either(RULES.those(lambda rule: rule.uses_curvature))}, but metric is {config.metric!r} and "
            f"selection is {config.selection!r}"
        )
    if form.in_8_bits is not None and not rule.chooses_bits and config.plan is None:
        raise ContradictionError(
            f"storage {config.storage!r} needs selection {either(RULES.those(lambda rule: rule.chooses_bits))}, "
            f"but selection is {config.selection!r}"
        )
    if config.weighs_rows and not (form.weighs_rows and metric.weighs_rows):
        raise ContradictionError(
            f"rows_in_16_bits 'loss_aware' needs storage "
            f"{either(STORAGES.those(lambda form: form.weighs_rows))} and metric "
            f"{either(METRICS.those(lambda metric: metric.weighs_rows))}, but storage is {config.storage!r} and "
            f"metric is {config.metric!r}"
        )


def refuse_not_narrow(config: "CompressionConfig", metrics: str, rules: str) -> None:
    """Raise ContradictionError if `narrow` is set, and another setting does not go with it.

    Args:
        config: the settings.
        metrics: names of the metrics that measure the loss.
        rules: names of the rules that can weigh hidden units.
    """
    if not config.narrow:
        return
    if not (config.metric_used.measures_loss and config.rule.narrows):
        raise ContradictionError(
            f"narrow compares losses, and needs metric {metrics} and selection {rules}, but metric is "
            f"{config.metric!r} and selection is {config.selection!r}"
        )
    if config.plan is not None:
        raise ContradictionError("a plan has ranks and no hidden widths, which leaves nothing for narrow to choose")
    if config.form.rounds or config.form.in_8_bits is not None:
        able = either(STORAGES.those(lambda form: not form.rounds and form.in_8_bits is None))
        raise ContradictionError(
            f"narrow leaves dense layers in the type of the model, and storage {config.storage!r} has 8 bits; take "
            f"storage {able}, or leave narrow out"
        )
    if config.by_blocks:
        raise ContradictionError(
            "memory 'blocks' frees the statistics of a layer before widths are chosen; set memory to 'whole', or leave "
            "narrow out"
        )
    if config.limits:
        raise ContradictionError(
            f"{' and '.join(config.limits)} cannot be kept, because the memory in which hidden units are chosen is not "
            "known; leave them or narrow out"
        )
    if config.truncations > 1:
        raise ContradictionError(
            f"narrow chooses hidden widths once, in the first truncation, but truncations is {config.truncations}; set "
            "it to 1, or leave narrow out"
        )
    if config.reestimate:
        raise ContradictionError(
            "reestimate measures the curvature along components, not that of removing hidden units; leave reestimate "
            "or narrow out"
        )
    if config.corrections and config.refits:
        raise ContradictionError(
            f"correction_step {config.correction_step!r} fits the outputs of layers with inputs of the dense model, "
            "which narrower layers do not get; take another one, or leave narrow out"
        )


def refuse_removals(config: "CompressionConfig", metrics: str, rules: str) -> None:
    """Raise ContradictionError if `remove_experts` is set, and another setting does not go with it.

    Args:
        config: the settings.
        metrics: names of the metrics that measure the loss.
        rules: names of the rules that can weigh removals.
    """
    if not config.remove_experts:
        return
    if not (config.metric_used.measures_loss and config.rule.removes):
        raise ContradictionError(
            f"remove_experts compares losses, and needs metric {metrics} and selection {rules}, but metric is "
            f"{config.metric!r} and selection is {config.selection!r}"
        )
    if config.plan is not None:
        raise ContradictionError("a plan has ranks of at least 1, which leaves nothing for remove_experts to choose")
    if config.corrections and config.refits:
        raise ContradictionError(
            f"correction_step {config.correction_step!r} needs inputs of every layer, which removed experts do not "
            "get; take another one, or leave remove_experts out"
        )


def refuse_not_for_kinds(config: "CompressionConfig") -> None:
    """Raise ContradictionError if a kind of modules is asked for, and another setting does not go with it."""
    if config.budget_in == "flops" and config.convolutions:
        raise ContradictionError(
            "the FLOPs of convolutions depend on the size of the image, so budget_in cannot be 'flops' with "
            "convolutions; take 'parameters' or 'bytes'"
        )
    if config.budget_in == "flops" and config.recurrent:
        raise ContradictionError(
            "matrices for the states of recurrent modules are multiplied out to run, which saves no FLOPs, so "
            "budget_in cannot be 'flops' with recurrent; take 'parameters' or 'bytes'"
        )
    if config.corrections and config.refits and (opted := config.opted):
        inputs = {"convolutions": "patches", "recurrent": "states at one position"}
        raise ContradictionError(
            f"correction_step {config.correction_step!r} compares inputs of whole sequences, which {inputs[opted[0]]} "
            f"are not; set {opted[0]} to False, or take another correction_step"
        )


def refuse_blocks(config: "CompressionConfig") -> None:
    """Raise ContradictionError if the statistics of all layers are not to be in memory together."""
    if config.by_blocks:
        raise ContradictionError(
            "the result of calibrate holds the statistics of all layers in memory, so memory cannot be 'blocks'; leave "
            "calibrate and statistics out, or set memory to 'whole'"
        )


def refuse_for_several(config: "CompressionConfig", size: int, *, statistics: bool, resumes: bool) -> None:
    """Raise ContradictionError for what several processes cannot do together outside of a Lightning Trainer.

    Args:
        config: the settings.
        size: number of processes.
        statistics: True if statistics are given.
        resumes: True if the compression is to go on from a folder.
    """
    asked = {"statistics": statistics, "resume_in": resumes, "memory 'blocks'": config.by_blocks}
    found = [name for name, given in asked.items() if given] + list(config.limits)
    if size > 1 and found:
        raise ContradictionError(
            f"{size} processes cannot compress one model together with {' and '.join(found)}; leave it out, or "
            "compress in one process and let all load the result"
        )


def either(names: Iterable[str]) -> str:
    """Return names as the alternatives of a sentence."""
    return " or ".join(map(repr, names))
