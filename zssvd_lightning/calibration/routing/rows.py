"""Which tokens of an expert are not padding, and whether positions of a convolution or a recurrence are.

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
from zssvd_lightning.layers.apart.recurrent import RecurrentLayers


class RoutedRows:
    """Masks of the tokens that experts get, while the experts run, and of the states at one position of a recurrence.

    Attributes:
        inside: True while an expert or a step of a recurrence runs.
        mask: mask (t,) of the tokens of the expert or the sequences of the step; None if all count.
    """

    mask: Tensor | None

    def __init__(self) -> None:
        self.inside, self.mask = False, None
        self._whole: Tensor | None = None
        self._positions: Tensor | None = None

    def watch(self, model: nn.Module, mask_of: Callable[[Tensor], Tensor | None], hooks: ExitStack) -> None:
        """Follow the experts, convolutions and recurrences of a model, until `hooks` are closed.

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

        for module in model.modules():
            if isinstance(module, ExpertList):
                hooks.callback(module.register_forward_pre_hook(enter_all, with_kwargs=True).remove)
            elif isinstance(module, UnfoldedConvolution):
                hooks.callback(module.register_forward_pre_hook(unsplit, with_kwargs=True).remove)
                hooks.callback(setattr, module, "splits", True)
            elif isinstance(module, Expert):
                hooks.callback(module.register_forward_pre_hook(enter).remove)
                hooks.callback(module.register_forward_hook(self._leave, always_call=True).remove)
        self._watch_recurrences(model, mask_of, hooks)

    def _watch_recurrences(
        self, model: nn.Module, mask_of: Callable[[Tensor], Tensor | None], hooks: ExitStack
    ) -> None:
        """Follow the recurrences of a model, as `watch` does."""

        def begin(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            X: Any = input_of(args, kwargs)
            mask = mask_of(X) if isinstance(X, Tensor) and X.dim() == 3 else None  # packed sequences have no padding
            sizes = () if mask is None else tuple(X.shape[:2])
            fits = mask is not None and tuple(mask.shape) == (sizes if module.batch_first else sizes[::-1])
            self._positions = mask.T if mask is not None and fits else None

        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.inside = True
            self.mask = None if self._positions is None else self._positions[args[2]].to(args[1].device)

        for module in model.modules():
            if isinstance(module, RecurrentLayers):
                hooks.callback(module.register_forward_pre_hook(begin, with_kwargs=True).remove)
                hooks.callback(module.step.register_forward_pre_hook(enter).remove)
                hooks.callback(module.step.register_forward_hook(self._leave, always_call=True).remove)

    def _leave(self, *_: Any) -> None:
        self.inside, self.mask = False, None
