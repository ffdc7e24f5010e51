"""One forward pass that runs the dense model and the truncated model together, each on half of the rows.

When the pass reaches a layer, the inputs of that layer in both models are known. Its weight may still change, and the
later layers then see the effect. Nothing of the pass is stored except the activations between two layers.

Shapes: a call has B rows of T positions; X is (2 B, T, n), (2 B T, n), or (T, 2 B, n) where modules of the model are
not `batch_first`. The first half of the rows belongs to the dense model.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from zssvd_lightning._contexts import evaluation_mode, no_cache, uncompiled
from zssvd_lightning.calibration.batches import has_positions_first, input_of, rows_that_count
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
    rows, left = _DoubledRows(model, call), set(layers)

    def before(name: str) -> Any:
        def split(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            X = input_of(args, kwargs)
            side, mask = rows.side(name, X), masks.of(name, X)
            halves = [half.transpose(0, side) for half in X.chunk(2, side)]
            of_halves = (None, None) if mask is None else mask.chunk(2)
            meet(name, *(rows_that_count(half, own) for half, own in zip(halves, of_halves, strict=True)))

        return split

    def after(name: str) -> Any:
        target = layers[name]

        def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            X = input_of(args, kwargs)
            side = rows.side(name, X)
            dense = X.chunk(2, side)[0]
            output.narrow(side, 0, dense.shape[side]).copy_(linear(dense, originals[name], target.module.bias))
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


class _DoubledRows:
    """Rows of a call that stand twice in the inputs of layers.

    Raises:
        CalibrationError: modules read positions first, and no mask tells how many rows and positions there are.
    """

    def __init__(self, model: nn.Module, call: Call) -> None:
        (self.B, self.T), self.positions_first = call.rows, has_positions_first(model)
        if self.positions_first and (call.mask is None or tuple(call.mask.shape) != (self.B, self.T)):
            raise CalibrationError(
                f"modules of {type(model).__name__} read (T, B, n), so a refit needs a mask (B, T) of its batches to "
                "tell rows from positions; give an attention_mask, set batch_first=True, or use another correction_step"
            )

    def side(self, name: str, X: Tensor) -> int:
        """Return the dimension of the rows of a layer's input. Raises CalibrationError if that cannot be told."""
        B, T = self.B, self.T
        flat = X.shape[0] == 2 * B * T and not (self.positions_first and T > 1)  # else in another order
        first = X.shape[0] == 2 * B or flat
        second = self.positions_first and X.dim() > 2 and X.shape[1] == 2 * B
        if first == second:
            raise CalibrationError(
                f"{name} reads {tuple(X.shape)} of {2 * B} sequences of {T}, so a refit cannot tell whose rows those "
                "are; add it to ignore, or use another correction_step or number of correction batches"
            )
        return int(second)


class _Over(Exception):  # noqa: N818  (not an error)
    """Signal that the last layer has run."""
