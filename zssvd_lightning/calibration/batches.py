"""Calibration batches: which of them a stage reads, their tokens, their loss terms, and the rows that count."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import chain, islice
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from zssvd_lightning._resources import counted
from zssvd_lightning.errors import CalibrationError
from zssvd_lightning.layers.apart.attention import ProjectedAttention
from zssvd_lightning.layers.apart.recurrent import RecurrentLayers

IGNORED_LABEL = -100


def tensors_in(batch: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested mappings and sequences, each with its path, such as `inputs.input_ids`."""
    if isinstance(batch, Tensor):
        yield path or "the batch", batch
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from tensors_in(value, f"{path}.{key}" if path else str(key))
    elif isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        for index, value in enumerate(batch):
            yield from tensors_in(value, f"{path}[{index}]")


def token_mask(batch: Any) -> Tensor | None:
    """Return the mask (B, T) of the positions that are not padding, from `attention_mask`, which may be nested.

    It is None if there is none, or several: the masks that the model is called with then count.
    """
    masks = [each["attention_mask"] for each in _mappings_with("attention_mask", batch)]
    masks = [mask for mask in masks if isinstance(mask, Tensor) and mask.dim() == 2]
    return masks[0].bool() if len(masks) == 1 else None


def loss_terms(batch: Any, *, shifts: bool = True) -> int:
    """Return the number of terms in the mean loss of a batch, which is the weight of its gradient.

    Labels, which may be nested, count where they are not -100. If labels have the shape (B, T) of their inputs, the
    first column does not count: causal models never predict it, and masked models have a special token there. Without
    labels, the number is that of the rows of the first tensor.

    Args:
        batch: the batch.
        shifts: False for a model that predicts the first column too, as an encoder-decoder does.

    Raises:
        CalibrationError: no label counts, or the batch has no tensor.
    """
    labeled = [each for each in _mappings_with("labels", batch) if isinstance(each["labels"], Tensor)]
    if labeled:
        ids = next((each["input_ids"] for each in _mappings_with("input_ids", batch)), None)
        terms = sum(int((_predicted(each, ids, shifts) != IGNORED_LABEL).sum()) for each in labeled)
        if terms == 0:
            raise CalibrationError("a calibration batch has no label to predict: all are -100; drop such batches")
        return terms
    for _, tensor in tensors_in(batch):
        if tensor.dim() > 0:
            return len(tensor)
    raise CalibrationError(
        f"cannot tell the size of a calibration batch of type {type(batch).__name__}, which holds no tensor; give "
        "batches of tensors, or say how many terms their mean loss has (terms of compress, loss_terms of the callback)"
    )


def refuse_malformed(batch: Any, number: int) -> None:
    """Raise CalibrationError if a mask in batch `number` does not have the shape of the ids beside it."""
    for ids_key, mask_key in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")):
        for each in _mappings_with(mask_key, batch):
            mask, ids = (each.get(key) for key in (mask_key, ids_key))
            if not isinstance(mask, Tensor) or not isinstance(ids, Tensor):
                continue
            if mask.dim() == ids.dim() == 2 and mask.shape != ids.shape:
                raise CalibrationError(
                    f"calibration batch {number}: {mask_key} is {tuple(mask.shape)}, but {ids_key} are "
                    f"{tuple(ids.shape)}; pad both to one length"
                )


def predicts_first_label(model: nn.Module) -> bool:
    """Return True if a module holds an encoder-decoder of transformers, which predicts all of its labels."""
    if isinstance(model, PreTrainedModel):
        return bool(getattr(model.config, "is_encoder_decoder", False))
    return any(predicts_first_label(part) for part in model.children())


def _predicted(labeled: Mapping[str, Any], ids: Any, shifts: bool) -> Tensor:
    """Return the labels that the loss depends on."""
    labels: Tensor = labeled["labels"]
    inputs = labeled.get("input_ids", ids)
    same_shape = isinstance(inputs, Tensor) and labels.dim() == 2 and labels.shape == inputs.shape
    return labels[:, 1:] if shifts and same_shape else labels


def _mappings_with(key: str, batch: Any) -> list[Mapping[str, Any]]:
    """Return the batch if it has a key, otherwise all mappings nested in it that have."""
    if isinstance(batch, Mapping):
        if key in batch:
            return [batch]
        batch = list(batch.values())
    if isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        return [found for value in batch for found in _mappings_with(key, value)]
    return []


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the input of a layer from the arguments that its hooks receive."""
    X: Tensor = args[0] if args else next(iter(kwargs.values()))
    return X


def rows_that_count(X: Tensor, mask: Tensor | None) -> Tensor:
    """Return the rows (N, n) of X where `mask` (B, T) is True.

    X is (B, T, n), (B T, n), or (T, B, n) for B != T. Every row of other shapes counts.
    """
    if mask is not None and X.shape[:-1] in (mask.shape, (mask.numel(),)):
        return X[mask.reshape(X.shape[:-1])]
    if mask is not None and X.shape[:-1] == mask.T.shape:
        return X[mask.T]
    return X.reshape(-1, X.shape[-1])


def refuse_square(model: nn.Module, mask: Any, number: int) -> None:
    """Raise CalibrationError if it cannot be told whether layers read (B, T, n) or (T, B, n) of batch `number`."""
    if not isinstance(mask, Tensor) or mask.dim() != 2 or len(mask) != mask.shape[1] or bool(mask.all()):
        return
    kinds = nn.MultiheadAttention | ProjectedAttention | RecurrentLayers
    if not all(part.batch_first for part in model.modules() if isinstance(part, kinds)):
        raise CalibrationError(
            f"batch {number} has padding and as many sequences as positions ({len(mask)}), so the layout (T, B, n) "
            "cannot be told; use another batch size, or batch_first=True"
        )


class Span(NamedTuple):
    """Batches of a stage."""

    first: int
    """Index of the first."""
    begin: int
    """Index of that which follows the last batch there is."""
    limit: int | None
    """How many; None for all."""


def so_many(batches: Iterable[Any], calibration_batches: int | None) -> int | None:
    """Return `calibration_batches`. Raises CalibrationError if there are fewer batches or it is below 1."""
    length = length_of(batches)
    if calibration_batches is not None and not 1 <= calibration_batches <= (length or calibration_batches):
        raise CalibrationError(
            f"calibration_batches is {calibration_batches}, of {'as many as come' if length is None else length} "
            "batches; have it at 1 or more and no more than there are, or leave it out for all"
        )
    return calibration_batches


def checked(batches: Iterable[Any], span: Span, step: str, *, progress: bool) -> Iterator[Any]:
    """Yield the batches of a span, with a progress bar.

    Raises:
        CalibrationError: there are no batches, or fewer than expected.
    """
    first, begin, limit = span
    parts = ((first, None), (begin, first), (0, begin))
    turned = chain.from_iterable(islice(batches, *part) for part in parts) if first else batches
    promised, expected = length_of(batches), number_of(batches, limit)
    seen = 0
    for batch in counted(islice(turned, limit), step, expected, "batch", shown=progress):
        yield batch
        seen += 1
    if seen == 0 or (promised is not None and expected is not None and seen < expected):
        raise CalibrationError(
            f"the {step} batches ended after {seen}"
            + (f" of {expected}" if expected else "")
            + "; pass a list or a DataLoader that gives at least one batch and can be gone through again"
        )


def number_of(batches: Iterable[Any], limit: int | None) -> int | None:
    """Return how many batches there will be at most; None if that is not known."""
    promised = length_of(batches)
    return promised if limit is None else limit if promised is None else min(limit, promised)


def length_of(batches: Iterable[Any]) -> int | None:
    """Return the number of batches, or None if it is not known."""
    try:
        return len(batches) if isinstance(batches, Sized) else None
    except TypeError:  # DataLoader.__len__ raises for an IterableDataset
        return None
