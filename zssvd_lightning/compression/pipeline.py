"""The whole method on any module, without a Trainer."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import chain, islice
from typing import Any, TypedDict, Unpack, cast

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from tqdm.auto import tqdm

from zssvd_lightning.calibration.batches import loss_terms, token_mask
from zssvd_lightning.calibration.collector import StatisticsCollector
from zssvd_lightning.compression.course import course, to_first_truncation
from zssvd_lightning.compression.engine import Compression
from zssvd_lightning.compression.phase import Phase
from zssvd_lightning.compression.report import Report
from zssvd_lightning.config.compression import CompressionConfig
from zssvd_lightning.config.settings import Settings
from zssvd_lightning.distributed import LayerSet
from zssvd_lightning.errors import CalibrationError
from zssvd_lightning.model.targets import find_targets
from zssvd_lightning.selection.plan import Plan
from zssvd_lightning.whitening.moments import Moments

Loss = Callable[[nn.Module, Any], Tensor]


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss a transformers model computes itself: `model(**batch).loss`."""
    loss: Tensor = model(**batch).loss
    return loss


def loss_in(precision: str) -> Loss:
    """`model_loss` in a precision as Lightning names it: `32-true` (that of the weights) or `bf16-mixed`.

    Statistics are gathered in float32 either way.
    """
    if precision == "32-true":
        return model_loss

    def mixed(model: nn.Module, batch: Any) -> Tensor:
        device = next(model.parameters()).device
        with torch.autocast(device.type, torch.bfloat16):
            return model_loss(model, batch)

    return mixed


@dataclass(frozen=True)
class BatchReading:
    """What a batch means. The defaults suit batches and models of transformers."""

    loss: Loss = model_loss
    """Mean loss of a batch, `loss(model, batch)`."""
    mask: Callable[[Any], Tensor | None] = token_mask
    """Positions (B, T) of a batch that are not padding, or None for all."""
    terms: Callable[[Any], float] = loss_terms
    """Number of terms that the mean loss of a batch runs over."""


class ReadingSettings(TypedDict, total=False):
    """The fields of `BatchReading` as keyword arguments."""

    loss: Loss
    mask: Callable[[Any], Tensor | None]
    terms: Callable[[Any], float]


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
    progress: bool = True,
    **asked: Unpack[Asked],
) -> Report:
    """Compress `model` in place: calibrate, truncate, correct and truncate again, factorize, quantize.

    Args:
        model: any module of `nn.Linear` or transformers' `Conv1D` layers.
        batches: calibration batches; a list or a DataLoader, since every correction goes through them again.
        config: what to remove and how; made of `preset` and the settings in `asked` when None.
        preset: method by name, such as `best`; the defaults of `CompressionConfig` when None.
        statistics: those of the first calibration, from `calibrate`, which may serve several compressions of equal
            models; the batches are then gone through for corrections alone.
        calibration_batches: how many batches, from the first, calibration takes; gradient steps go on with those after
            them, and after the last with the first again. All of them when None.
        progress: draw progress bars.
        asked: settings of `CompressionConfig`, such as `prune_ratio=0.3`, which win over the preset; and `loss`, `mask`
            and `terms` of `BatchReading`, for other batches than those of transformers.

    Returns:
        The report: ranks, parameters, predicted drift, calibration losses, seconds per step.

    Raises:
        ZSSVDError: one of its kinds, by what went wrong. The model, its hooks, its training mode, its gradients and
            its `requires_grad` flags are then as they were.

    Example:
        >>> report = compress(model, batches, prune_ratio=0.3, preset="best")  # doctest: +SKIP
    """
    config, reading = _understood(config, preset, asked)
    run = Compression(model, config, progress)
    with _undone_on_error(run), _gradients_set_aside(model):
        for stage in course(config):
            if statistics is None:
                gather(run, batches, stage.gathers, calibration_batches, reading)
            else:  # let go of here, so that the truncation can free them
                run.gathering.moments, statistics = _fitting(run, statistics), None
            run.take(stage)
        run.factorize()
        run.quantize()
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
    """Return the statistics that the first truncation of `compress` would go by; the model stays as it is.

    Takes the arguments of `compress`, and raises what it raises, but for errors of the budget: of the settings only
    the layers and what the metric needs matter.
    """
    config, reading = _understood(config, preset, asked)
    statistics = StatisticsCollector(
        model, LayerSet(find_targets(model, config.include, config.ignore)), config.watches_outputs
    )
    with _gradients_set_aside(model):
        every = _checked(batches, 0, _so_many(batches, calibration_batches), Phase.CALIBRATE, progress=progress)
        _observe(model, statistics, every, Phase.CALIBRATE, reading)
    statistics.moments.output_side = config.watches_outputs
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
    """Return the ranks that the first truncation of `compress` would choose; the model stays as it is.

    Takes the arguments of `compress`, and raises what it raises.
    """
    config, reading = _understood(config, preset, asked)
    run = Compression(model, config, progress)
    with _gradients_set_aside(model):
        *before, truncation = to_first_truncation(course(config))
        for stage in before:
            gather(run, batches, stage.gathers, calibration_batches, reading)
            run.take(stage)
        gather(run, batches, truncation.gathers, calibration_batches, reading)
        return run.plan()


def _understood(
    config: CompressionConfig | None, preset: str | None, asked: Asked
) -> tuple[CompressionConfig, BatchReading]:
    """Return what to do, and what a batch means. Raises ConfigError."""
    settings: dict[str, Any] = dict(asked)
    reading = {field.name: settings.pop(field.name) for field in fields(BatchReading) if field.name in settings}
    return CompressionConfig.asked(config, preset, cast("Settings", settings)), BatchReading(**reading)


def gather(
    compression: Compression,
    batches: Iterable[Any],
    phase: Phase,
    calibration_batches: int | None = None,
    reading: BatchReading | None = None,
) -> None:
    """The statistics of one step, from one forward and one backward pass over each batch.

    CALIBRATE takes second moments and gradients over the first `calibration_batches`, CORRECT the gradients over
    `correction_batches`, of which every round takes the next. The other arguments are those of `compress`.

    Raises:
        CalibrationError: there are no batches, fewer than promised, or one that cannot be used.
    """
    first, limit = 0, _so_many(batches, calibration_batches)
    if phase is Phase.CORRECT:
        limit = compression.config.correction_batches
        first = (calibration_batches or 0) + compression.rounds * limit
        if length := _length(batches):
            first %= length
    with compression.stopwatch(phase.value):
        wanted = _checked(batches, first, limit, phase, progress=compression.progress)
        _observe(compression.model, compression.gathering, wanted, phase, reading or BatchReading())


def _observe(
    model: nn.Module, statistics: StatisticsCollector, batches: Iterable[Any], phase: Phase, reading: BatchReading
) -> None:
    """One forward and one backward pass over each batch; CORRECT takes no second moments."""
    device = next(model.parameters()).device
    for raw in batches:
        batch = move_data_to_device(raw, device)
        weight = reading.terms(batch)
        with (
            torch.enable_grad(),
            statistics.observing(reading.mask(batch), inputs=phase is Phase.CALIBRATE) as observation,
        ):
            batch_loss = reading.loss(model, batch)
            observation.forward_done()
            statistics.add_loss(batch_loss, weight, weight)
            batch_loss.backward()  # type: ignore[no-untyped-call]
            statistics.collect_gradients(weight)


def _so_many(batches: Iterable[Any], calibration_batches: int | None) -> int | None:
    """`calibration_batches`, if there are so many. Raises CalibrationError."""
    length = _length(batches)
    if calibration_batches is not None and not 1 <= calibration_batches <= (length or calibration_batches):
        raise CalibrationError(
            f"calibration_batches is {calibration_batches}, of {'as many as come' if length is None else length} "
            "batches; have it at 1 or more and no more than there are, or leave it out for all"
        )
    return calibration_batches


def _checked(batches: Iterable[Any], first: int, limit: int | None, step: str, *, progress: bool) -> Iterator[Any]:
    """`limit` batches from number `first` on, and from the start again after the last, under a progress bar.

    Raises:
        CalibrationError: there are fewer than promised.
    """
    turned = chain(islice(batches, first, None), islice(batches, first)) if first else batches
    promised = _length(batches)
    expected = promised if limit is None else limit if promised is None else min(limit, promised)
    seen = 0
    for batch in tqdm(islice(turned, limit), total=expected, desc=step, unit="batch", disable=not progress):
        yield batch
        seen += 1
    if seen == 0 or (promised is not None and expected is not None and seen < expected):
        raise CalibrationError(
            f"the {step} batches ended after {seen}"
            + (f" of {expected}" if expected else "")
            + "; pass a list or a DataLoader that gives at least one batch and can be gone through again"
        )


def _fitting(compression: Compression, statistics: Moments) -> Moments:
    """The statistics where the model is; their tensors are not copied if they are there. Raises CalibrationError."""
    widths = {leader: A.shape[0] for leader, A in statistics.input_sums.items()}
    for name, leader in statistics.leaders.items():
        target = compression.targets.get(name)
        if target is None or widths[leader] != target.shape[1]:
            found = "no layer to compress" if target is None else f"a layer {target.shape}"
            raise CalibrationError(
                f"the statistics are of another model or other layers: {name} of width {widths[leader]} is {found} "
                "here; calibrate this one"
            )
    side = compression.config.watches_outputs
    for name in statistics.leaders if side is not None else ():
        B = statistics.output_sums.get(name)
        if B is None or len(B) != compression.targets[name].shape[0] or statistics.output_side not in (None, side):
            raise CalibrationError(
                f"the statistics have no {side} gradients at the output of {name} {compression.targets[name].shape}, "
                f"by which metric {compression.config.metric!r} goes; calibrate with a config of that metric and "
                "output_side"
            )
    device = next(compression.model.parameters()).device
    return Moments(**move_data_to_device(statistics.state_dict(), device))


def _length(batches: Iterable[Any]) -> int | None:
    try:
        return len(batches) if isinstance(batches, Sized) else None
    except TypeError:  # a DataLoader over an IterableDataset has a __len__ that refuses
        return None


@contextmanager
def _undone_on_error(compression: Compression) -> Iterator[None]:
    try:
        yield
    except BaseException:
        compression.restore()
        raise


@contextmanager
def _gradients_set_aside(model: nn.Module) -> Iterator[None]:
    """Hides gradients the caller has on the model, and brings them back for the parameters that remain."""
    before: Mapping[nn.Parameter, Tensor | None] = {p: p.grad for p in model.parameters()}
    for parameter in before:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in before.items():
            parameter.grad = gradient
