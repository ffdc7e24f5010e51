"""Calls of the model that are recorded during calibration and can be run again."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torch.nn.functional import pad

from zssvd_lightning.calibration.batches import IGNORED_LABEL
from zssvd_lightning.distributed import Team
from zssvd_lightning.errors import CalibrationError, CheckpointError

PLAIN = (Tensor, bool, int, float, str, type(None))


class Call(NamedTuple):
    """Arguments of a forward pass that can be run again."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: Tensor | None
    """Mask (B, T) of the batch; None to go by the masks of the call."""
    asked: bool = False
    """True if the user's function gave the mask; see `TokenMask`."""

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any], mask: Tensor | None, asked: bool = False) -> "Call":
        """Record a call, with copies of its tensors.

        Args:
            args: positional arguments of the model.
            kwargs: keyword arguments of the model.
            mask: mask (B, T) of the batch; None to go by the masks of the call.
            asked: True if the user's function gave the mask.

        Raises:
            CalibrationError: an argument is not a tensor, number, string or None.
        """
        for key, value in [*enumerate(args), *kwargs.items()]:
            if not isinstance(value, PLAIN):
                raise CalibrationError(
                    f"a refit runs batches again, but argument {key!r} of the model is a {type(value).__name__}, which "
                    "may have changed by then; pass tensors, or use another correction_step"
                )
        kept = {key: _kept(value) for key, value in kwargs.items()}
        return cls(tuple(map(_kept, args)), kept, mask, asked)

    def to(self, device: torch.device | str) -> "Call":
        """Return the call with its tensors on another device."""
        return Call(*move_data_to_device((self.args, self.kwargs, self.mask, self.asked), device))

    @property
    def rows(self) -> tuple[int, int]:
        """Numbers of rows and positions (B, T): the first two sizes of the first tensor with two or more dimensions.

        Raises:
            CalibrationError: there is no such tensor.
        """
        for value in (*self.args, *self.kwargs.values()):
            if isinstance(value, Tensor) and value.dim() >= 2:
                return value.shape[0], value.shape[1]
        raise CalibrationError(
            "a refit takes batches apart by rows, but the model is called without a tensor of rows; use another "
            "correction_step"
        )


def together(calls: Sequence[Call]) -> Call:
    """Return one call with the rows of all calls; shorter rows are padded on the right.

    Raises:
        CalibrationError: the calls differ in arguments other than rows, or in length while a call has no mask.
    """
    rows = [call.rows for call in calls]
    first, length = calls[0], max(T for _, T in rows)
    if any(call.mask is None for call in calls) and len({T for _, T in rows}) > 1:
        lengths = ", ".join(sorted({str(T) for _, T in rows}))
        raise CalibrationError(
            f"a refit puts batches together, but they are of lengths {lengths} and have no attention_mask; give them "
            "one, or batches of one length"
        )

    def joined(key: int | str, values: Sequence[Any]) -> Any:
        filler = IGNORED_LABEL if key == "labels" else 0
        cut = [isinstance(v, Tensor) and v.dim() > 0 and len(v) == B for v, (B, _) in zip(values, rows, strict=True)]
        if all(cut):
            return _all_rows(key, [_lengthened(v, T, length, filler) for v, (_, T) in zip(values, rows, strict=True)])
        same = [torch.equal(v, values[0]) if isinstance(v, Tensor) else v == values[0] for v in values]
        if any(cut) or not all(same):
            raise CalibrationError(
                f"a refit puts batches together, but argument {key!r} of the model differs in them; leave it out, or "
                "use another correction_step"
            )
        return values[0]

    if any((len(call.args), call.kwargs.keys()) != (len(first.args), first.kwargs.keys()) for call in calls):
        raise CalibrationError(
            "a refit puts batches together, but the model is called with other arguments for some; give all the same, "
            "or use another correction_step"
        )
    return Call(
        tuple(joined(i, [call.args[i] for call in calls]) for i in range(len(first.args))),
        {key: joined(key, [call.kwargs[key] for call in calls]) for key in first.kwargs},
        joined("mask", [call.mask for call in calls]),
        first.asked,
    )


def own_calls(saved: Sequence[Sequence[Any]], team: Team, device: torch.device) -> list[Call]:
    """Return this process's share of the saved calls. Raises CheckpointError if there are too few for all."""
    own = [Call(*call) for call in saved[team.rank :: team.size]]
    if saved and not own:
        raise CheckpointError(
            f"the checkpoint was taken with {len(saved)} batches noted for a refit, which are too few for "
            f"{team.size} processes; go on with fewer"
        )
    return [call.to(device) for call in own]


def _kept(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _all_rows(key: int | str, values: Sequence[Tensor]) -> Tensor:
    """Return the rows of all values. Raise CalibrationError if they differ in other sizes than their number."""
    if len({value.shape[1:] for value in values}) > 1:
        shapes = " and ".join(sorted({str(tuple(value.shape)) for value in values}))
        raise CalibrationError(
            f"a refit puts batches together, but argument {key!r} of the model is of shapes {shapes}; pad it to one "
            "length in all batches, or use another correction_step"
        )
    return torch.cat(list(values))


def _lengthened(value: Tensor, length: int, wanted: int, filler: int) -> Tensor:
    """Append the filler along the second dimension, if that is the dimension of positions."""
    if value.dim() < 2 or value.shape[1] != length:
        return value
    return pad(value, [0, 0] * (value.dim() - 2) + [0, wanted - length], value=filler)
