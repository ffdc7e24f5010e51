"""Gathering of statistics: batches run through a model outside of a Trainer."""

from collections.abc import Callable, Iterable, Iterator, Sized
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, TypedDict

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from tqdm.auto import tqdm

from zssvd_lightning._types import check_types
from zssvd_lightning.calibration.batches import loss_terms, token_mask
from zssvd_lightning.calibration.collector import StatisticsCollector
from zssvd_lightning.calibration.contexts import measuring
from zssvd_lightning.compression.engine import Compression
from zssvd_lightning.compression.kept_batches import KEPT_BACK, number_to_keep_back
from zssvd_lightning.compression.phase import Phase
from zssvd_lightning.compression.safeguard import Safeguard
from zssvd_lightning.errors import CalibrationError

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
) -> None:
    """Gather the statistics of one step, with one forward and one backward pass over each batch.

    CALIBRATE gathers second moments and gradients over the first `calibration_batches` batches. CORRECT gathers
    gradients over `correction_batches` batches, different ones in every round. The other arguments are those of
    `compress`.

    Raises:
        CalibrationError: there are no batches or fewer than expected, or a batch cannot be used.
    """
    first, limit = 0, so_many(batches, calibration_batches)
    if phase is Phase.CORRECT:
        limit = compression.config.correction_batches
        first = (calibration_batches or 0) + compression.rounds * limit
        if length := _length(batches):
            first %= length
    guard = compression.safeguard
    with compression.stopwatch(phase.value):
        wanted = checked(batches, first, limit, phase, progress=compression.progress)
        if guard is not None and guard.wants_batches:
            wanted = kept_back(wanted, guard)
        observe(compression.model, compression.gathering, wanted, phase, reading or BatchReading())


def safeguard_of(model: nn.Module, reading: BatchReading) -> Safeguard:
    """Return a safeguard that measures batches as `reading` says, without batches yet."""

    def measure(raw: Any) -> tuple[float, float]:
        batch = move_data_to_device(deepcopy(raw), next(model.parameters()).device)
        terms = float(reading.terms(batch))
        with measuring(model):
            return float(reading.loss(model, batch)), terms

    return Safeguard(measure)


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


def observe(
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


def so_many(batches: Iterable[Any], calibration_batches: int | None) -> int | None:
    """Return `calibration_batches`. Raises CalibrationError if there are fewer batches or it is below 1."""
    length = _length(batches)
    if calibration_batches is not None and not 1 <= calibration_batches <= (length or calibration_batches):
        raise CalibrationError(
            f"calibration_batches is {calibration_batches}, of {'as many as come' if length is None else length} "
            "batches; have it at 1 or more and no more than there are, or leave it out for all"
        )
    return calibration_batches


def checked(batches: Iterable[Any], first: int, limit: int | None, step: str, *, progress: bool) -> Iterator[Any]:
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


def _length(batches: Iterable[Any]) -> int | None:
    try:
        return len(batches) if isinstance(batches, Sized) else None
    except TypeError:  # DataLoader.__len__ raises for an IterableDataset
        return None
