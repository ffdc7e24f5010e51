"""Gathering of statistics: batches run through a model outside of a Trainer."""

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict, cast

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn

from zssvd_lightning._contexts import same_random_numbers
from zssvd_lightning._types import check_types
from zssvd_lightning.calibration.batches import (
    Span,
    checked,
    length_of,
    loss_terms,
    number_of,
    predicts_first_label,
    refuse_malformed,
    refuse_square,
    so_many,
    token_mask,
)
from zssvd_lightning.calibration.collector import StatisticsCollector
from zssvd_lightning.calibration.contexts import measuring, unchanged_sampler
from zssvd_lightning.calibration.masks import mask_of
from zssvd_lightning.compression.engine import Compression
from zssvd_lightning.compression.memory.extent import Extent, extent_of, faked
from zssvd_lightning.compression.memory.needs import stored_components
from zssvd_lightning.compression.memory.statements import refuse_small_disk_of
from zssvd_lightning.compression.phase import Phase
from zssvd_lightning.compression.safeguard import Safeguard
from zssvd_lightning.decomposition.in_parts import DecompositionInParts
from zssvd_lightning.errors import CalibrationError
from zssvd_lightning.serialization.kept_batches import KEPT_BACK, number_to_keep_back
from zssvd_lightning.sweep.records import Batch
from zssvd_lightning.sweep.sweep import sweep
from zssvd_lightning.whitening.moments import Moments
from zssvd_lightning.whitening.spectrum import Spectrum

if TYPE_CHECKING:
    from zssvd_lightning.compression.resuming.resumption import Resumption

logger = logging.getLogger(__name__)

Loss = Callable[[nn.Module, Any], Tensor]


SAY_THE_LOSS = "say what the loss of a batch is: compress(..., loss=lambda model, batch: ...)"


@dataclass(frozen=True)
class ModelLoss:
    """Loss that a transformers model computes itself: `model(**batch).loss`."""

    mixed: bool = False
    """True to run the model under autocast in bfloat16."""

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the loss of a batch. Raises CalibrationError if the model gives none."""
        device = next(model.parameters()).device
        with torch.autocast(device.type, torch.bfloat16) if self.mixed else nullcontext():
            output = model(**batch)
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if loss is None:
            raise CalibrationError(
                f"{type(model).__name__} returns {type(output).__name__} without a loss for a batch of "
                f"{', '.join(map(str, batch))}; give it labels, or {SAY_THE_LOSS}"
            )
        return cast("Tensor", loss)

    def refuse(self, model: nn.Module, batch: Any, number: int) -> None:
        """Raise CalibrationError if the model cannot be called with batch `number` as keyword arguments."""
        if not isinstance(batch, Mapping):
            raise CalibrationError(
                f"calibration batch {number} is a {type(batch).__name__}, but without a loss the model is called with "
                f"the keys of each batch; give mappings such as {{'input_ids': ..., 'labels': ...}}, or {SAY_THE_LOSS}"
            )
        try:
            inspect.signature(model.forward).bind(**batch)
        except TypeError as error:
            raise CalibrationError(
                f"{type(model).__name__} cannot be called with calibration batch {number} of "
                f"{', '.join(map(str, batch))}: {error}; give its arguments, or {SAY_THE_LOSS}"
            ) from error


model_loss = ModelLoss()


def loss_in(precision: str) -> Loss:
    """Return `model_loss` in a Lightning precision: `32-true` (the type of the weights) or `bf16-mixed`.

    Statistics are gathered in float32 in both cases.
    """
    return model_loss if precision == "32-true" else ModelLoss(mixed=True)


@dataclass(frozen=True)
class BatchReading:
    """Functions that read a batch. The defaults suit batches and models of transformers."""

    loss: Loss = model_loss
    """Function that returns the mean loss of a batch, `loss(model, batch)`."""
    mask: Callable[[Any], Tensor | None] = token_mask
    """Function that returns the mask (B, T) of the positions of the inputs that are not padding; None to go by the
    masks that the model is called with. Other stacks, such as a decoder, go by the masks of their own calls."""
    terms: Callable[[Any], float] = loss_terms
    """Function that returns the number of terms in the mean loss of a batch. Override it for batches without `labels`,
    and for losses that are no mean over all labels."""

    @classmethod
    def of(cls, model: nn.Module, batches: Iterable[Any], given: "ReadingSettings") -> "BatchReading":
        """Return the functions that read the batches of a model.

        Raises:
            CalibrationError: the functions given do not suit the model or, if all batches are at hand, a batch.
        """
        if "terms" not in given and predicts_first_label(model):
            given = {**given, "terms": partial(loss_terms, shifts=False)}
        reading = cls(**given)
        if isinstance(reading.loss, ModelLoss) and hasattr(model, "training_step"):
            raise CalibrationError(
                f"{type(model).__name__} is a LightningModule, whose loss is that of its training_step; compress it in "
                "a fit with ZSSVDCallback, or pass the model inside of it, or "
                "loss=lambda module, batch: module.training_step(batch, 0)"
            )
        for number, batch in enumerate(batches if isinstance(batches, list | tuple) else (), 1):
            reading.refuse(model, batch, number)
        return reading

    def refuse(self, model: nn.Module, batch: Any, number: int) -> None:
        """Raise CalibrationError if batch `number` cannot be run."""
        if isinstance(self.loss, ModelLoss):
            self.loss.refuse(model, batch, number)
        refuse_malformed(batch, number)
        refuse_square(model, self.mask(batch), number)

    def __post_init__(self) -> None:
        check_types(self)


class ReadingSettings(TypedDict, total=False):
    """Fields of `BatchReading` as keyword arguments."""

    loss: Loss
    mask: Callable[[Any], Tensor | None]
    terms: Callable[[Any], float]


def gather(
    compression: Compression,
    batches: Iterable[Any],
    phase: Phase,
    calibration_batches: int | None = None,
    reading: BatchReading | None = None,
    *,
    decomposes: bool = False,
    resumption: "Resumption | None" = None,
) -> None:
    """Gather the statistics of one step, with one forward and one backward pass over each batch.

    CALIBRATE gathers second moments and gradients over the first `calibration_batches` batches. CORRECT gathers
    gradients over `correction_batches` batches, different ones in every round, and none of those kept back. The other
    arguments are those of `compress`. With `decomposes`, a sweep decomposes each block once it has the statistics of
    it, and drops these. With `resumption`, it goes on after the blocks that an interrupted run has finished.

    Raises:
        CalibrationError: there are no batches or fewer than expected, or a batch cannot be used.
    """
    span = Span(0, 0, so_many(batches, calibration_batches))
    if phase is Phase.CORRECT:
        span = _of_correction(compression, batches, calibration_batches)
    guard = compression.safeguard
    with compression.stopwatch(phase.value):
        wanted = checked(batches, span, phase, progress=compression.progress)
        count, begins = number_of(batches, span.limit), decomposes and compression.truncations == 0
        keeps = guard is not None and guard.wants_batches
        if resumption is not None:
            wanted = resumption.noting(wanted, span, keeps=keeps)
        if guard is not None and keeps:
            wanted = kept_back(wanted, guard)
        reading = reading or BatchReading.of(compression.model, batches, {})
        if compression.config.by_blocks:
            compression.parts = parts = _in_parts(compression) if decomposes else None
            sweep(
                compression.gathering,
                compression.targets,
                _read(compression.model, wanted, reading),
                compression.store,
                inputs=phase is Phase.CALIBRATE,
                use=None if parts is None else parts.take,
                finished=None if resumption is None else resumption.parts(parts),
                after_first=partial(refuse_small_disk_of, compression, count) if count and begins else None,
                progress=compression.progress,
            )
            if parts is not None:
                spent = sum(parts.stopwatch.seconds.values())
                compression.stopwatch.add("spectrum", spent)
                compression.stopwatch.add(phase.value, -spent)
        else:
            observe(compression.model, compression.gathering, wanted, phase, reading)


def _of_correction(compression: Compression, batches: Iterable[Any], calibration_batches: int | None) -> Span:
    """Return the batches of this round of corrections.

    Steps leave out the batches kept back, since a step can only be judged on batches that it was not taken on.
    """
    limit, length, guard = compression.config.correction_batches, length_of(batches), compression.safeguard
    kept, calibrated = 0, calibration_batches or length
    if guard is not None and compression.truncations:
        kept = len(guard.batches) if calibrated is None else number_to_keep_back(calibrated)
    if length and kept >= length:
        if compression.rounds == 0:
            logger.warning("corrections are judged on the batches that they are taken on; pass more than %d", length)
        kept = 0
    first = max(kept, calibration_batches or 0) + compression.rounds * limit
    if length:
        others = length - kept
        first, limit = kept + (first - kept) % others, min(limit, others)
    return Span(first, kept, limit)


def _in_parts(compression: Compression) -> DecompositionInParts:
    """Return the empty decomposition that a sweep fills block by block."""
    run = compression
    return DecompositionInParts(
        run.model,
        run.targets,
        run.metric,
        run.store.tuples(Spectrum),
        highest=stored_components(run.config, run.budget),
        outputs=run.config.watches_outputs is not None,
        weigh=run.config.weighs_rows,
        round_off=run.budget.chooses_bits,
        keep=run.gathering.keeps,
    )


def extent_by_first(
    batches: Iterable[Any], calibration_batches: int | None, reading: BatchReading, run: Compression
) -> Extent:
    """Return the sizes of a model and of its calibration, by its first batch unless that can be had only once."""
    model, count = run.model, number_of(batches, calibration_batches) or 1
    device = next(model.parameters()).device
    with same_random_numbers(), unchanged_sampler(batches):  # the order of a DataLoader stays what it is
        iterator = iter(batches)
        first = None if iterator is batches else next(iterator, None)

    def forward(fake: nn.Module) -> Tensor:
        return reading.loss(fake, move_data_to_device(faked(first), device))

    return extent_of(model, run.targets, count, None if first is None else forward)


def safeguard_of(model: nn.Module, reading: BatchReading, *, refuses: bool = False) -> Safeguard:
    """Return a safeguard that measures batches as `reading` says, without batches yet; see `Safeguard`."""

    def measure(raw: Any) -> tuple[float, float]:
        batch = move_data_to_device(deepcopy(raw), next(model.parameters()).device)
        terms = float(reading.terms(batch))
        with measuring(model):
            return float(reading.loss(model, batch)), terms

    return Safeguard(measure, refuses=refuses)


def kept_back(batches: Iterable[Any], guard: Safeguard) -> Iterator[Any]:
    """Yield batches, and keep copies of the first of them back."""
    count = 0
    for count, batch in enumerate(batches, 1):
        if count <= KEPT_BACK and guard.wants_batches:
            try:
                guard.batches.append(deepcopy(batch))
            except Exception as error:  # noqa: BLE001  batches are of any type
                guard.give_up(f"{type(error).__name__}: {error}")
        yield batch
    del guard.batches[number_to_keep_back(count) :]


def fitting(compression: Compression, statistics: Moments) -> Moments:
    """Return statistics of `calibrate` on the model's device, copied only if needed.

    Raises:
        CalibrationError: they are of another model or other layers, or lack what the metric goes by.
    """
    if statistics.watched and (others := [name for name in compression.targets if name not in statistics.watched]):
        raise CalibrationError(
            f"the statistics are of other layers: they leave out {', '.join(others[:3])} ({len(others)} layers); "
            "calibrate with the same include and ignore"
        )
    if compression.config.narrow and not statistics.narrower:
        raise CalibrationError("the statistics tell nothing of removing hidden units; calibrate with narrow=True")
    for name, leader in statistics.leaders.items():
        target, width = compression.targets.get(name), len(statistics.input_sums[leader])
        if target is None or width != target.shape[1]:
            found = "no layer to compress" if target is None else f"a layer {target.shape}"
            raise CalibrationError(
                f"the statistics are of another model or other layers: {name} of width {width} is {found} here; "
                "calibrate this one"
            )
    side = compression.config.watches_outputs
    for name in statistics.leaders if side is not None else ():
        B = statistics.output_sums.get(name)
        m, unknown = compression.targets[name].shape[0], statistics.output_side is None
        wrong = unknown and name in statistics.gradient_sums if B is None else len(B) != m
        if wrong or statistics.output_side not in (None, side):
            raise CalibrationError(
                f"the statistics have no {side} gradients at the output of {name} {compression.targets[name].shape}, "
                f"by which metric {compression.config.metric!r} goes; calibrate with a config of that metric and "
                "output_side"
            )
    return Moments(**move_data_to_device(statistics.state_dict(), next(compression.model.parameters()).device))


def observe(
    model: nn.Module, statistics: StatisticsCollector, batches: Iterable[Any], phase: Phase, reading: BatchReading
) -> None:
    """Run one forward and one backward pass over each batch. CORRECT takes no second moments."""
    for batch in _read(model, batches, reading):
        with (
            torch.enable_grad(),
            statistics.observing(batch.mask, inputs=phase is Phase.CALIBRATE) as observation,
        ):
            batch_loss = batch.loss()
            observation.forward_done()
            statistics.add_loss(batch_loss, batch.terms, batch.terms)
            batch_loss.backward()  # type: ignore[no-untyped-call]
            statistics.collect_gradients(batch.terms)


def _read(model: nn.Module, batches: Iterable[Any], reading: BatchReading) -> Iterator[Batch]:
    """Yield the batches as they are run. Raises CalibrationError if one cannot be."""
    device = next(model.parameters()).device

    def loss(raw: Any) -> Tensor:
        return reading.loss(model, move_data_to_device(raw, device))

    for number, raw in enumerate(batches):
        reading.refuse(model, raw, number + 1)
        batch = move_data_to_device(raw, device)
        yield Batch(partial(loss, raw), mask_of(batch, reading.mask), reading.terms(batch), number)
