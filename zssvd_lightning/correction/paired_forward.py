"""One forward pass of the dense model and the truncated one together, each on half of the rows.

Where a layer is reached, its inputs in both are known, and its weight may still be changed, so that the layers behind
it see what comes of that. Nothing of the pass is kept but for the rows between two layers.

Shapes: a call has B rows of T positions; X is (2 B, T, n) or (2 B T, n), the first half of it dense.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from zssvd_lightning._contexts import evaluation_mode, no_cache, uncompiled
from zssvd_lightning.calibration.batches import input_of, rows_that_count
from zssvd_lightning.calibration.recorded_calls import Call, together
from zssvd_lightning.errors import CalibrationError
from zssvd_lightning.model.targets import Target

Meet = Callable[[str, Tensor, Tensor], None]


@torch.no_grad()
def run_side_by_side(
    model: nn.Module, call: Call, layers: Mapping[str, Target], originals: Mapping[str, Tensor], meet: Meet
) -> None:
    """Runs the rows of `call` through the model with original weights and through the one there is now, in one pass.

    It ends with the last of `layers`. Mode and cache setting are as before on any exit, and no hook is left.

    Args:
        model: what is called.
        call: with which rows.
        layers: those that have an original weight of their own.
        originals: name -> it (m, n).
        meet: is given the name of a layer and its inputs (N, n) at the N positions that count, first in the model with
            original weights, before it runs.

    Raises:
        CalibrationError: a layer reads rows that cannot be told apart.
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
            meet(name, *(rows_that_count(half, call.mask) for half in X.chunk(2)))

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
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(no_cache(model))
        stack.enter_context(uncompiled())
        for name, target in layers.items():
            stack.callback(target.module.register_forward_pre_hook(before(name), with_kwargs=True).remove)
            stack.callback(target.module.register_forward_hook(after(name), with_kwargs=True).remove)
        try:
            model(*doubled.args, **doubled.kwargs)
        except _Over:
            return


class _Over(Exception):  # noqa: N818  (nothing has gone wrong)
    """The last layer has run."""
