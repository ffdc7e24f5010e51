"""Precision of calibration in a run of a Trainer."""

from contextlib import AbstractContextManager, nullcontext

from torch import nn
from transformers import TrainingArguments

from zssvd_lightning._contexts import overridden


def without_fp16(args: TrainingArguments, model: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which a model trained in fp16 runs in the type of its weights.

    The Trainer scales its own losses, so that their gradients do not underflow in fp16. Those of calibration are not
    scaled. accelerate runs the forward pass under autocast, except on CPUs, and keeps the former one in the model.
    """
    without = getattr(model, "_original_forward", None)
    if not args.fp16 or without is None:
        return nullcontext()
    return overridden(model, forward=without)
