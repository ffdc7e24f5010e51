"""Which tokens of an expert are not padding, and whether positions of a convolution are.

Shapes: N = B T tokens, of which an expert gets t.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from zssvd_lightning.calibration.batches import input_of
from zssvd_lightning.layers.apart.convolutions import UnfoldedConvolution
from zssvd_lightning.layers.apart.experts import Expert, ExpertList


class RoutedRows:
    """Masks of the tokens that experts get, while the experts run.

    Attributes:
        inside: True while an expert runs.
        mask: mask (t,) of the tokens of the expert that runs; None if all count.
    """

    mask: Tensor | None

    def __init__(self) -> None:
        self.inside, self.mask = False, None
        self._whole: Tensor | None = None

    def watch(self, model: nn.Module, mask_of: Callable[[Tensor], Tensor | None], hooks: ExitStack) -> None:
        """Follow the experts and convolutions of a model, until `hooks` are closed.

        A convolution makes the patches of all images at once if their positions have a mask.

        Args:
            model: any module.
            mask_of: function that returns the mask of the tokens (N, n) of all experts of a layer; None if all count.
            hooks: stack to which the removal of the hooks is added.
        """

        def enter_all(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            X = input_of(args, kwargs)
            mask = mask_of(X)
            if mask is not None and isinstance(module, ExpertList) and module.repeats:
                mask = mask.reshape(-1).repeat(len(module.experts))
            self._whole = None if mask is None or mask.numel() != X[..., 0].numel() else mask.reshape(-1)

        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            tokens: Tensor = args[1]
            self.inside = True
            self.mask = None if self._whole is None else self._whole.to(tokens.device)[tokens]

        def unsplit(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            X = input_of(args, kwargs)
            places = math.prod(module.positions(X))
            mask = mask_of(X.new_empty(len(X), places, 0))
            module.splits = mask is None or tuple(mask.shape) != (len(X), places)

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.inside, self.mask = False, None

        for module in model.modules():
            if isinstance(module, ExpertList):
                hooks.callback(module.register_forward_pre_hook(enter_all, with_kwargs=True).remove)
            elif isinstance(module, UnfoldedConvolution):
                hooks.callback(module.register_forward_pre_hook(unsplit, with_kwargs=True).remove)
                hooks.callback(setattr, module, "splits", True)
            elif isinstance(module, Expert):
                hooks.callback(module.register_forward_pre_hook(enter).remove)
                hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
