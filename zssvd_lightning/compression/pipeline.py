"""Compression of any module without a Trainer: `compress`, `calibrate` and `plan`."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Unpack, cast

from torch import nn

from zssvd_lightning._contexts import gradients_set_aside
from zssvd_lightning._types import of_type
from zssvd_lightning._validation import require
from zssvd_lightning.calibration.batches import Span, checked, refuse_one_pass, so_many
from zssvd_lightning.calibration.collector import StatisticsCollector
from zssvd_lightning.calibration.terms import check_terms
from zssvd_lightning.compression.corrections import reestimate_batch_norms
from zssvd_lightning.compression.course import course, to_first_truncation
from zssvd_lightning.compression.engine import Compression
from zssvd_lightning.compression.gathering import (
    BatchReading,
    ReadingSettings,
    extent_by_first,
    fitting,
    gather,
    kept_back,
    observe,
    safeguard_of,
)
from zssvd_lightning.compression.memory.limits import within_limits
from zssvd_lightning.compression.memory.mapped import little_resident
from zssvd_lightning.compression.memory.statements import announce, memory_of_statistics, refuse_small_disk
from zssvd_lightning.compression.phase import Phase
from zssvd_lightning.compression.reach import warn_of_unreached_in
from zssvd_lightning.compression.report import Report
from zssvd_lightning.compression.resuming.resumption import (
    checked_place,
    folder_of,
    held_by,
    refuse_other_run,
    resumable,
)
from zssvd_lightning.config.compression import CompressionConfig
from zssvd_lightning.config.contradictions import refuse_blocks, refuse_for_several
from zssvd_lightning.config.settings import Settings
from zssvd_lightning.distributed import LayerSet, Team
from zssvd_lightning.errors import ContradictionError
from zssvd_lightning.model.apart.routers import removable_experts
from zssvd_lightning.model.coverage import Coverage
from zssvd_lightning.model.readiness import refuse_unready
from zssvd_lightning.model.recompression import StandIns
from zssvd_lightning.model.targets import find_targets
from zssvd_lightning.selection.plan import Plan
from zssvd_lightning.serialization.kept_batches import KEPT_BACK
from zssvd_lightning.serialization.transformers_config import mark
from zssvd_lightning.serialization.unfinished import UnfinishedFolder
from zssvd_lightning.whitening.moments import Moments

logger = logging.getLogger(__name__)


class Asked(Settings, ReadingSettings, total=False):
    """Keyword arguments of `compress`: the settings of `CompressionConfig` and the fields of `BatchReading`."""


def compress(
    model: nn.Module,
    batches: Iterable[Any],
    config: CompressionConfig | None = None,
    *,
    preset: str | None = None,
    statistics: Moments | None = None,
    calibration_batches: int | None = None,
    resume_in: str | Path | UnfinishedFolder | None = None,
    refuse_diverged: bool = True,
    team: Team | None = None,
    progress: bool = True,
    **asked: Unpack[Asked],
) -> Report:
    """Compress `model` in place: calibrate, truncate, correct and truncate again, factorize, quantize.

    Layers that are low-rank already are compressed further: their ranks never grow, and a layer that a new truncation
    would not make smaller keeps its factors. They take the memory of dense layers meanwhile. `ratio_of` says whether
    `prune_ratio` counts from the dense or from the present model.

    Args:
        model: any module with `nn.Linear` or transformers `Conv1D` layers, or with convolutions; see `convolutions`.
        batches: calibration batches, as a list or a DataLoader, because every correction iterates over them again.
        config: settings of the compression; None to build them from `preset` and `asked`.
        preset: name of a preset, such as `zs-svd`, the method of the paper; None for `best`.
        statistics: result of `calibrate`, used for the first truncation. It can be reused for several compressions of
            identical models. The batches are then used for corrections only.
        calibration_batches: number of batches, from the first, that calibration uses; None for all. Gradient steps use
            the batches after these, and start again at the first batch after the last.
        resume_in: folder for what a run with `memory="blocks"` has finished, block by block. If the run is interrupted,
            the same call goes on from there, and gives the same ranks and weights; see `docs/scaling.md`. It is removed
            at the end. None to keep nothing.
        refuse_diverged: raise DivergedError, and leave the model as it was, if the loss on the batches kept back ends
            at ten times that of the dense model or more and has risen by more than 0.5 nats. False warns instead, for
            models that are trained afterward. With `statistics` and without corrections, no loss is measured.
        team: processes that compress copies of the model together, such as `distributed.Replicas(device)`; None for
            this process alone. Each passes batches of its own and the same settings, and all get the same layers: those
            of one process that sees the batches of all. Numbers of batches are those of one process.
        progress: draw progress bars.
        asked: settings of `CompressionConfig`, such as `prune_ratio=0.3`, which override the preset, and `loss`,
            `mask` and `terms` of `BatchReading` for batches of other kinds than those of transformers.

    Returns:
        The report: coverage, ranks, parameters, losses before and after, seconds per step.

    Raises:
        DivergedError: the compression destroyed the model; see `refuse_diverged`.
        ProcessFailedError: another process of the team has an error, in the batches or in its part of the work.
        ContradictionError: with several processes, `statistics`, `resume_in`, `memory="blocks"`, or limits of memory.
        ZSSVDError: a subclass that depends on the error. The model, its hooks, its training mode, its gradients and its
            `requires_grad` flags are then restored.

    Example:
        For a transformers model and batches that it is called with, `compress(model, batches, prune_ratio=0.3)` is
        enough. Other models need to say what their loss is:

        >>> import torch
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> batches = [(torch.randn(64, 16), torch.randint(8, (64,))) for _ in range(8)]
        >>> def loss(model, batch):
        ...     return nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> terms = lambda batch: len(batch[1])
        >>> report = compress(model, batches, prune_ratio=0.3, loss=loss, terms=terms, progress=False)
        >>> report.reached >= 0.3
        True
    """
    team = team or Team()
    with team.together():
        config, reading = _understood(model, batches, config, preset, calibration_batches, progress, asked)
        of_type(bool, refuse_diverged, "refuse_diverged")
        resume_in = checked_place(resume_in, config)
        _check_statistics(statistics, config)
        refuse_for_several(config, team.size, statistics=statistics is not None, resumes=resume_in is not None)
    with gradients_set_aside(model), _low_rank_made_dense(model, config) as stand_ins:
        with team.together():
            run = within_limits(
                partial(Compression, model, progress=progress, team=team, stand_ins=stand_ins),
                config,
                partial(extent_by_first, batches, calibration_batches, reading),
                held=held_by(resume_in),
            )
            announce(run)
            refuse_small_disk(run, folder_of(resume_in))
            refuse_one_pass(batches, len(course(config)))
        with (
            _undone_on_error(run),
            little_resident(model, config),
            resumable(run, resume_in, calibration_batches, reading) as resumption,
        ):
            if statistics is None or config.corrections or config.convolutions:
                run.safeguard = safeguard_of(model, reading, refuses=refuse_diverged)
            if statistics is not None and run.safeguard is not None:
                list(kept_back(islice(batches, calibration_batches or KEPT_BACK), run.safeguard))
            stages = course(config)
            for stage in stages if resumption is None else resumption.remaining(stages, batches):
                if statistics is None:
                    gather_part = partial(gather, decomposes=stage.decomposes, resumption=resumption)
                    with team.together():
                        gather_part(run, batches, stage.gathers, calibration_batches, reading)
                else:
                    run.gathering.free_widths.load_state_dict(statistics.widths)
                    # drop the reference, so that the truncation can free them
                    run.gathering.moments, statistics = fitting(run, statistics), None
                run.take(stage)
                if resumption is not None:
                    resumption.finish_stage()
            run.factorize()
            run.quantize()
            reestimate_batch_norms(run)
    return run.report()


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    config: CompressionConfig | None = None,
    *,
    preset: str | None = None,
    calibration_batches: int | None = None,
    progress: bool = True,
    **asked: Unpack[Asked],
) -> Moments:
    """Return the statistics for the first truncation of `compress`. The model does not change.

    Arguments and errors are those of `compress`, except for errors of the budget. The settings that matter are those
    that select layers, those of the metric, and the storage: for `pivoted`, hidden widths of free order are found too,
    and for `narrow` those that can have fewer units.
    """
    config, reading = _understood(model, batches, config, preset, calibration_batches, progress, asked)
    refuse_blocks(config)
    if config.place != "none" or config.limits:
        given = ", ".join(config.limits) or f"offload {config.offload!r}"
        raise ContradictionError(
            f"the result of calibrate is in memory, which {given} cannot change; leave it out, or leave calibrate out "
            "and call compress"
        )
    with gradients_set_aside(model), _low_rank_made_dense(model, config):
        layers = LayerSet(find_targets(model, config.include, config.ignore, config.opted))
        statistics = StatisticsCollector(model, layers, config.watches_outputs)
        statistics.finds_widths, statistics.free_widths.narrows = config.tries_widths, config.narrow
        statistics.routed = removable_experts(model, layers) if config.remove_experts else ()
        every = checked(batches, Span(0, 0, so_many(batches, calibration_batches)), Phase.CALIBRATE, progress=progress)
        guard = safeguard_of(model, reading)
        observe(model, statistics, kept_back(every, guard), Phase.CALIBRATE, reading)
        warn_of_unreached_in(statistics, layers, config, sum(p.numel() for p in model.parameters()))
        check_terms(guard.measure, guard.batches, Team())
    statistics.moments.widths = statistics.free_widths.state_dict()
    statistics.moments.narrower = config.narrow
    statistics.moments.output_side, statistics.moments.watched = config.watches_outputs, list(layers)
    return statistics.moments


def plan(
    model: nn.Module,
    batches: Iterable[Any],
    config: CompressionConfig | None = None,
    *,
    preset: str | None = None,
    calibration_batches: int | None = None,
    progress: bool = True,
    **asked: Unpack[Asked],
) -> Plan:
    """Return the ranks that the first truncation of `compress` would choose. The model does not change.

    Arguments and errors are those of `compress`.
    """
    config, reading = _understood(model, batches, config, preset, calibration_batches, progress, asked)
    config.refuse_plan()
    with gradients_set_aside(model), _low_rank_made_dense(model, config) as stand_ins:
        build = partial(Compression, model, progress=progress, stand_ins=stand_ins)
        run = within_limits(build, config, partial(extent_by_first, batches, calibration_batches, reading))
        run.safeguard = safeguard_of(model, reading)
        logger.info(memory_of_statistics(run))
        refuse_small_disk(run)
        *before, truncation = to_first_truncation(course(config))
        with little_resident(model, config):
            for stage in before:
                gather(run, batches, stage.gathers, calibration_batches, reading, decomposes=stage.decomposes)
                run.take(stage)
            gather(run, batches, truncation.gathers, calibration_batches, reading, decomposes=truncation.decomposes)
            ranks = run.plan()
            run.safeguard.check_terms(run)
        return ranks


def refuse_beforehand(
    model: nn.Module,
    batches: Iterable[Any],
    config: CompressionConfig,
    *,
    calibration_batches: int | None = None,
    resume_in: str | Path | UnfinishedFolder | None = None,
    progress: bool = True,
    **asked: Unpack[Asked],
) -> None:
    """Raise what `compress` would raise if it needs too much memory, or `resume_in` is of another run. Nothing changes.

    Arguments and errors are those of `compress`.
    """
    if config.limits or resume_in is not None:
        config, reading = _understood(model, batches, config, None, calibration_batches, progress, asked)
        resume_in = checked_place(resume_in, config)
        with _low_rank_made_dense(model, config) as stand_ins:
            build = partial(Compression, model, progress=False, stand_ins=stand_ins)
            extent = partial(extent_by_first, batches, calibration_batches, reading)
            run = within_limits(build, config, extent, held=held_by(resume_in))
            refuse_other_run(run, resume_in, calibration_batches)


def coverage_of(model: nn.Module, config: CompressionConfig) -> Coverage:
    """Return which share of a model `compress` would work on. Nothing is changed.

    Raises:
        ZSSVDError: what `compress` raises before the first batch; see `Compression`.
    """
    with _low_rank_made_dense(model, config) as stand_ins:
        return Compression(model, config, progress=False, stand_ins=stand_ins).coverage


def _check_statistics(statistics: Moments | None, config: CompressionConfig) -> None:
    """Raise ContradictionError if settings do not allow the statistics of all layers; ConfigError for another type."""
    require(isinstance(statistics, Moments | None), "statistics", statistics, "a result of calibrate, or None")
    if statistics is not None:
        refuse_blocks(config)
        if config.limits:
            raise ContradictionError(
                f"statistics are in memory as a whole, so {' and '.join(config.limits)} cannot be kept; leave them or "
                "statistics out"
            )


def _understood(
    model: nn.Module,
    batches: Iterable[Any],
    config: CompressionConfig | None,
    preset: str | None,
    calibration_batches: int | None,
    progress: bool,
    asked: Asked,
) -> tuple[CompressionConfig, BatchReading]:
    """Return the settings and the functions that read a batch.

    Raises:
        ConfigError: an argument is invalid.
        TargetError: the model cannot run where it is; see `refuse_unready`.
        CalibrationError: a batch or the model cannot be used; see `BatchReading.of`.
    """
    of_type(int | None, calibration_batches, "calibration_batches")
    of_type(bool, progress, "progress")
    refuse_unready(model)
    settings: dict[str, Any] = dict(asked)
    reading = {field.name: settings.pop(field.name) for field in fields(BatchReading) if field.name in settings}
    understood = CompressionConfig.asked(config, preset, cast("Settings", settings))
    return understood, BatchReading.of(model, batches, cast("ReadingSettings", reading))


@contextmanager
def _low_rank_made_dense(model: nn.Module, config: CompressionConfig) -> Iterator[StandIns]:
    """Make the selected low-rank layers dense within the context; see `StandIns`."""
    stand_ins = StandIns(model, config.include, config.ignore, opted=config.opted)
    try:
        with stand_ins.meanwhile():
            yield stand_ins
    finally:
        if stand_ins.layers:
            mark(model)


@contextmanager
def _undone_on_error(compression: Compression) -> Iterator[None]:
    try:
        yield
    except BaseException:
        compression.restore()
        raise
