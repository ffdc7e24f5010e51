"""Compression of any module without a Trainer: `compress`, `calibrate` and `plan`."""

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
    """Return the loss that a transformers model computes itself: `model(**batch).loss`."""
    loss: Tensor = model(**batch).loss
    return loss


def loss_in(precision: str) -> Loss:
    """Return `model_loss` in a Lightning precision: `32-true` (the type of the weights) or `bf16-mixed`.

    Statistics are gathered in float32 in both cases.
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
    """Functions that read a batch. The defaults suit batches and models of transformers."""

    loss: Loss = model_loss
    """Function that returns the mean loss of a batch, `loss(model, batch)`."""
    mask: Callable[[Any], Tensor | None] = token_mask
    """Function that returns the mask (B, T) of the positions that are not padding; None for all."""
    terms: Callable[[Any], float] = loss_terms
    """Function that returns the number of terms in the mean loss of a batch."""


class ReadingSettings(TypedDict, total=False):
    """Fields of `BatchReading` as keyword arguments."""

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
        model: any module with `nn.Linear` or transformers `Conv1D` layers.
        batches: calibration batches, as a list or a DataLoader, because every correction iterates over them again.
        config: settings of the compression; None to build them from `preset` and `asked`.
        preset: name of a preset, such as `best`; None for the defaults of `CompressionConfig`.
        statistics: result of `calibrate`, used for the first truncation. It can be reused for several compressions of
            identical models. The batches are then used for corrections only.
        calibration_batches: number of batches, from the first, that calibration uses; None for all. Gradient steps use
            the batches after these, and start again at the first batch after the last.
        progress: draw progress bars.
        asked: settings of `CompressionConfig`, such as `prune_ratio=0.3`, which override the preset, and `loss`,
            `mask` and `terms` of `BatchReading` for batches of other kinds than those of transformers.

    Returns:
        The report: ranks, parameters, predicted drift, calibration losses, seconds per step.

    Raises:
        ZSSVDError: a subclass that depends on the error. The model, its hooks, its training mode, its gradients and its
            `requires_grad` flags are then restored.

    Example:
        For a transformers model and batches that it is called with, `compress(model, batches, prune_ratio=0.3)` is
        enough. Other models need to say what their loss is:

        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> batches = [(torch.randn(64, 16), torch.randint(8, (64,))) for _ in range(8)]
        >>> def loss(model, batch):
        ...     return nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> terms = lambda batch: len(batch[1])
        >>> report = compress(model, batches, prune_ratio=0.3, loss=loss, terms=terms, progress=False)
        >>> report.reached >= 0.3
        True
    """
    config, reading = _understood(config, preset, asked)
    run = Compression(model, config, progress)
    with _undone_on_error(run), _gradients_set_aside(model):
        for stage in course(config):
            if statistics is None:
                gather(run, batches, stage.gathers, calibration_batches, reading)
            else:  # drop the reference, so that the truncation can free them
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
    """Return the statistics for the first truncation of `compress`. The model does not change.

    Arguments and errors are those of `compress`, except for errors of the budget. Only the settings that select layers
    and those of the metric have an effect.
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
    """Return the ranks that the first truncation of `compress` would choose. The model does not change.

    Arguments and errors are those of `compress`.
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
    """Return the settings and the functions that read a batch. Raises ConfigError for invalid settings."""
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
    """Gather the statistics of one step, with one forward and one backward pass over each batch.

    CALIBRATE gathers second moments and gradients over the first `calibration_batches` batches. CORRECT gathers
    gradients over `correction_batches` batches, different ones in every round. The other arguments are those of
    `compress`.

    Raises:
        CalibrationError: there are no batches or fewer than expected, or a batch cannot be used.
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
    """Run one forward and one backward pass over each batch. CORRECT takes no second moments."""
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
    """Return `calibration_batches`. Raises CalibrationError if there are fewer batches or it is below 1."""
    length = _length(batches)
    if calibration_batches is not None and not 1 <= calibration_batches <= (length or calibration_batches):
        raise CalibrationError(
            f"calibration_batches is {calibration_batches}, of {'as many as come' if length is None else length} "
            "batches; have it at 1 or more and no more than there are, or leave it out for all"
        )
    return calibration_batches


def _checked(batches: Iterable[Any], first: int, limit: int | None, step: str, *, progress: bool) -> Iterator[Any]:
    """Yield `limit` batches from index `first` on, starting again after the last, with a progress bar.

    Raises:
        CalibrationError: there are no batches, or fewer than expected.
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
    """Return the statistics on the model's device, copied only if needed. Raise CalibrationError if they do not fit."""
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
    except TypeError:  # DataLoader.__len__ raises for an IterableDataset
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
    """Remove the caller's gradients from the model, and restore them on exit for the parameters that remain."""
    before: Mapping[nn.Parameter, Tensor | None] = {p: p.grad for p in model.parameters()}
    for parameter in before:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in before.items():
            parameter.grad = gradient
