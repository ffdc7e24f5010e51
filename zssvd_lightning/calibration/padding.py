"""Padding of a decoder that no mask and no label shows.

Shapes: ids and masks are (B, T).
"""

import logging
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

_TOLD: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Decoders of which a warning was given."""


def warn_of_padding(decoder: nn.Module, given: Mapping[str, Any]) -> None:
    """Warn, once for each decoder, if it is called with ids that seem padded and nothing says where.

    Args:
        decoder: module that was called without a mask, with no label beside.
        given: arguments of the call, by name. Embeddings do not show padding; nothing is said of them.
    """
    ids, encoder_mask = given.get("input_ids"), given.get("encoder_attention_mask")
    if decoder in _TOLD or given.get("attention_mask") is not None or not isinstance(ids, Tensor):
        return
    pad = getattr(getattr(decoder, "config", None), "pad_token_id", None)
    hidden = isinstance(encoder_mask, Tensor) and encoder_mask.dim() == 2 and not bool(encoder_mask.bool().all())
    if (pad is not None or hidden) and ends_in_padding(ids, pad):
        _TOLD.add(decoder)
        logger.warning(
            "%s is called with ids that seem padded, but with no mask and no labels, so that all positions count in "
            "the statistics; give the model decoder_attention_mask, or labels that are -100 at padding",
            type(decoder).__name__,
        )


def ends_in_padding(ids: Tensor, pad: int | None) -> bool:
    """Return whether rows of ids (B, T) end in padding, as far as the ids tell.

    Some row then ends in two or more of the same id, which is `pad` if that is known, and not all rows in as many.
    """
    if ids.dim() != 2 or ids.shape[1] < 2 or ids.is_floating_point():
        return False
    last = ids[:, -1:] if pad is None else torch.full_like(ids[:, -1:], pad)
    runs = (ids == last).flip(1).cumprod(1).sum(1)
    return bool(runs.max() >= 2 and runs.max() > runs.min())
