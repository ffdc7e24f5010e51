"""Logits of a transformers model inside a module."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from zssvd_lightning.errors import LogitsError


def logits_of(output: Any) -> Tensor:
    """Return the logits in the output of a transformers model.

    Raises:
        LogitsError: the output has no logits.
    """
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits")
    if not isinstance(logits, Tensor):
        raise LogitsError(
            f"logits are needed, but the model returns {type(output).__name__} without any; have it return them as "
            "models of transformers do, or override ZSSVDCallback.student to name one that does"
        )
    return logits


def model_with_logits(module: nn.Module) -> nn.Module:
    """Return the only outermost transformers model inside a module.

    Raises:
        LogitsError: there is none, or more than one.
    """
    found: list[tuple[str, nn.Module]] = []
    for name, part in module.named_modules():
        if isinstance(part, PreTrainedModel) and not any(name.startswith(outer) for outer, _ in found):
            found.append((f"{name}." if name else "", part))
    if len(found) != 1:
        raise LogitsError(
            f"it needs to be known which model's logits count, and {type(module).__name__} holds {len(found)} of "
            "transformers; override ZSSVDCallback.student to name one that returns logits"
        )
    return found[0][1]
