"""Checks of what torch is asked during the forward pass of a calibration batch, before it fails or gives wrong sums."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from zssvd_lightning.errors import CalibrationError


class CheckedOperands(TorchFunctionMode):
    """Context in which token ids and labels out of range are refused, and losses that differentiate themselves.

    Args:
        number: number of the batch, from 1, for the messages.
        name_of: function that returns the name under which the model got a tensor; None if it did not.
    """

    def __init__(self, number: int, name_of: Callable[[Tensor], str | None]) -> None:
        super().__init__()
        self._number, self._name_of = number, name_of

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Check the arguments of a function of torch, and call it."""
        given = dict(kwargs or {})
        if func is functional.embedding:
            self._check_ids(args[0], args[1])
        elif func in (functional.cross_entropy, functional.nll_loss):
            self._check_labels(args[0], args[1], given.get("ignore_index", -100))
        elif func is Tensor.backward or (func is torch.autograd.grad and given.get("create_graph")):
            raise CalibrationError(
                f"calibration batch {self._number}: the loss takes derivatives of its own (create_graph or backward), "
                "so that its gradient needs a second order, which is not supported; calibrate without that term"
            )
        return func(*args, **given)

    def _check_ids(self, ids: Any, weight: Any) -> None:
        if not isinstance(ids, Tensor) or ids.numel() == 0:
            return
        name = self._name_of(ids) or "the ids"
        if ids.is_floating_point():
            self._refuse(f"{name} of shape {tuple(ids.shape)} are {ids.dtype}, not torch.long")
        self._check_range(name, ids, len(weight), "the embedding")

    def _check_labels(self, scores: Any, labels: Any, ignored: int) -> None:
        if not isinstance(labels, Tensor) or not isinstance(scores, Tensor) or labels.shape == scores.shape:
            return
        if labels.is_floating_point():
            self._refuse(f"the labels of shape {tuple(labels.shape)} are {labels.dtype}, not torch.long")
        self._check_range("labels", labels[labels != ignored], scores.shape[min(1, scores.dim() - 1)], "the loss")

    def _check_range(self, name: str, indices: Tensor, size: int, where: str) -> None:
        if indices.numel() == 0:
            return
        least, most = (int(bound) for bound in indices.aminmax())
        if least < 0 or most >= size:
            self._refuse(f"{name} go from {least} to {most}, but {where} has {size}: from 0 to {size - 1}")

    def _refuse(self, message: str) -> None:
        raise CalibrationError(f"calibration batch {self._number}: {message}; fix the batch")
