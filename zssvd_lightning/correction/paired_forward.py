"""One forward pass that runs the dense model and the truncated model together, each on half of the rows.

When the pass reaches a layer, the inputs of that layer in both models are known. Its weight may still change, and the
later layers then see the effect. Nothing of the pass is stored except the activations between two layers.

Shapes: a call has B rows of T positions; X is (2 B, T, n) or (2 B T, n). The first half of it belongs to the dense
model.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from zssvd_lightning._contexts import evaluation_mode, no_cache, uncompiled
from zssvd_lightning.calibration.batches import input_of, rows_that_count
from zssvd_lightning.calibration.masks import Masks, TokenMask
from zssvd_lightning.calibration.recorded_calls import Call, together
from zssvd_lightning.errors import CalibrationError
from zssvd_lightning.model.targets import Target

Meet = Callable[[str, Tensor, Tensor], None]
"""Function that receives a layer name and the layer's inputs (N, n) in the dense and in the truncated model."""


@torch.no_grad()
def run_side_by_side(
    model: nn.Module, call: Call, layers: Mapping[str, Target], originals: Mapping[str, Tensor], meet: Meet
) -> None:
    """Run the rows of `call` through the model with the original weights and with the current ones, in one pass.

    The pass stops after the last of `layers`. On any exit, training mode and cache setting are restored and all hooks
    are removed.

    Args:
        model: model to run.
        call: recorded call with the rows.
        layers: layers that use their original weight in the dense half.
        originals: name -> original weight (m, n).
        meet: function called before a layer runs, with its name, its inputs (N, n) in the dense model and those in the
            truncated model, at the N unmasked positions.

    Raises:
        CalibrationError: the input of a layer cannot be split into the rows of both models.
    """
    (B, T), left = call.rows, set(layers)

    def before(name: str) -> Any:
        def split(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            X = input_of(args, kwargs)
            if X.shape[0] not in (2 * B, 2 * B * T):
                raise CalibrationError(
                    f"{name} reads {tuple(X.shape)} of {2 * B} sequences of {T}, so a refit cannot tell whose rows "
                    "those are; add it to ignore, or use another correction_step"
                )
            mask = masks.of(name, X)
            of_halves = (None, None) if mask is None else mask.chunk(2)
            meet(name, *(rows_that_count(half, own) for half, own in zip(X.chunk(2), of_halves, strict=True)))

        return split

    def after(name: str) -> Any:
        target = layers[name]

        def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            X = input_of(args, kwargs)
            half = len(X) // 2
            output[:half] = linear(X[:half], originals[name], target.module.bias)
            left.discard(name)
            if not left:
                raise _Over

        return replace

    doubled = together([call, call])
    masks = Masks(TokenMask(doubled.mask, doubled.asked))
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(no_cache(model))
        stack.enter_context(uncompiled())
        stack.callback(masks.close)
        masks.watch(model)
        for name, target in layers.items():
            stack.callback(target.module.register_forward_pre_hook(before(name), with_kwargs=True).remove)
            stack.callback(target.module.register_forward_hook(after(name), with_kwargs=True).remove)
        try:
            model(*doubled.args, **doubled.kwargs)
        except _Over:
            return


class _Over(Exception):  # noqa: N818  (not an error)
    """Signal that the last layer has run."""
