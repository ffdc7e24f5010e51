"""The whole method on any module, without a Trainer."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypedDict, Unpack

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from tqdm.auto import tqdm

from zssvd_lightning.calibration import loss_terms, token_mask
from zssvd_lightning.compression import Compression, steps
from zssvd_lightning.config import CompressionConfig
from zssvd_lightning.errors import CalibrationError
from zssvd_lightning.phase import Phase
from zssvd_lightning.plan import Plan
from zssvd_lightning.report import Report

Loss = Callable[[nn.Module, Any], Tensor]


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss a transformers model computes itself: `model(**batch).loss`."""
    loss: Tensor = model(**batch).loss
    return loss


class Reading(TypedDict, total=False):
    """What a batch means; each has a default that suits batches and models of transformers."""

    loss: Loss
    """Mean loss of a batch, `loss(model, batch)`."""
    mask: Callable[[Any], Tensor | None]
    """Which positions (B, T) of a batch are not padding, or None for all."""
    terms: Callable[[Any], float]
    """How many terms the mean loss of a batch runs over."""


def compress(
    model: nn.Module,
    batches: Iterable[Any],
    config: CompressionConfig | None = None,
    *,
    progress: bool = True,
    **reading: Unpack[Reading],
) -> Report:
    """Compresses `model` in place: calibrate, truncate, correct and truncate again, factorise, store.

    Args:
        model: any module of `nn.Linear` or transformers' `Conv1D` layers.
        batches: calibration batches; a list or a DataLoader, since every correction goes through them again.
        config: what to remove and how; the defaults of `CompressionConfig` when None.
        progress: whether to draw progress bars.
        reading: `loss`, `mask` and `terms`, for other batches than those of transformers; see `Reading`.

    Returns:
        The report: ranks, parameters, predicted drift, calibration losses, seconds per step.

    Raises:
        ZSSVDError: one of its kinds, by what went wrong. The model, its hooks, its training mode, its gradients and
            its `requires_grad` flags are then as they were.
    """
    config = config or CompressionConfig()
    compression = Compression(model, config, progress)
    with _undone_on_error(compression), _gradients_set_aside(model):
        for step in steps(config):
            gather(compression, batches, step.gathers, **reading)
            step.act(compression)
        compression.factorise()
        compression.store()
    return compression.report()


def plan(
    model: nn.Module,
    batches: Iterable[Any],
    config: CompressionConfig | None = None,
    *,
    progress: bool = True,
    **reading: Unpack[Reading],
) -> Plan:
    """The ranks that the first truncation of `compress` would choose; the model stays as it is.

    Takes the arguments of `compress`, and raises what it raises.
    """
    compression = Compression(model, config or CompressionConfig(), progress)
    with _gradients_set_aside(model):
        gather(compression, batches, Phase.CALIBRATE, **reading)
        return compression.plan()


def gather(
    compression: Compression,
    batches: Iterable[Any],
    phase: Phase,
    *,
    loss: Loss = model_loss,
    mask: Callable[[Any], Tensor | None] = token_mask,
    terms: Callable[[Any], float] = loss_terms,
) -> None:
    """The statistics of one step, from one forward and one backward pass over each batch.

    CALIBRATE takes second moments and gradients over all batches, CORRECT the gradients over the first
    `correction_batches` of them. The other arguments are those of `compress` and of `Reading`.

    Raises:
        CalibrationError: there are no batches, fewer than promised, or one that cannot be used.
    """
    device = next(compression.model.parameters()).device
    limit = compression.config.correction_batches if phase is Phase.CORRECT else None
    with compression.stopwatch(phase.value):
        for raw in _checked(batches, limit, phase, progress=compression.progress):
            batch = move_data_to_device(raw, device)
            weight = terms(batch)
            with (
                torch.enable_grad(),
                compression.gathering.observing(mask(batch), inputs=phase is Phase.CALIBRATE) as observation,
            ):
                batch_loss = loss(compression.model, batch)
                observation.forward_done()
                compression.gathering.add_loss(batch_loss, weight)
                batch_loss.backward()  # type: ignore[no-untyped-call]
                compression.gathering.collect_gradients(weight)


def _checked(batches: Iterable[Any], limit: int | None, step: str, *, progress: bool) -> Iterator[Any]:
    """The first `limit` batches under a progress bar. Raises CalibrationError when there are fewer than promised."""
    promised = _length(batches)
    expected = promised if limit is None else limit if promised is None else min(limit, promised)
    seen = 0
    for batch in tqdm(islice(batches, limit), total=expected, desc=step, unit="batch", disable=not progress):
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
