"""State of optimizers that rests in host memory or in a scratch file while no step is taken."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from zssvd_lightning.offload.media import ScratchFile, refuse_too_little

logger = logging.getLogger(__name__)

PARKS: tuple[bool | str, ...] = (True, False, "auto")
"""Values of the setting `park_optimizer`."""


def parked_in(setting: bool | str, place: str, *, on_cpu: bool) -> str | None:
    """Return where the state of an optimizer rests: `cpu`, `disk`, or None if it stays where it is.

    Args:
        setting: the setting `park_optimizer`; `auto` parks the state of accelerators, and only with `offload`.
        place: the setting `offload`: `none`, `cpu` or `disk`.
        on_cpu: True for state that is in host memory already.
    """
    if setting is False or (setting == "auto" and (on_cpu or place == "none")):
        return None
    if place == "disk":
        return "disk"
    return None if on_cpu else "cpu"


class _Parked(NamedTuple):
    """Tensor of a state, and what it was before."""

    tensor: Tensor
    device: torch.device
    stride: tuple[int, ...]


class Parking:
    """Parked state of optimizers.

    Tensors stay the same objects and get other memory, so that a state dict is complete at any moment.

    Attributes:
        setting: the setting `park_optimizer`.
        rests: True from `park` to `bring_back`.
    """

    def __init__(self) -> None:
        self.setting: bool | str = False
        self.rests = False
        self._parked: list[_Parked] = []

    @torch.no_grad()
    def park(self, optimizers: Iterable[Optimizer], place: str) -> None:
        """Move the state to where `parked_in` says.

        Tensors that are not plain, have attributes, or share their memory stay.

        Args:
            optimizers: the optimizers.
            place: the setting `offload`.

        Raises:
            OutputError: a scratch file cannot be written.
        """
        self.rests = True
        found = [
            (tensor, where)
            for tensor in _movable(optimizers)
            if (where := parked_in(self.setting, place, on_cpu=_is_on_cpu(tensor))) is not None
        ]
        sizes = Counter[str]()
        for tensor, where in found:
            sizes[where] += tensor.nbytes
        refuse_too_little(sizes["disk"], "park_optimizer")
        file = ScratchFile()
        for tensor, where in found:
            before = _Parked(tensor, tensor.device, tensor.stride())
            if where == "cpu":
                tensor.data = tensor.to("cpu", copy=True)
            else:
                tensor.data = file.get(file.put(tensor.cpu(), None))
            self._parked.append(before)
        for where, size in sizes.items():
            name = "host memory" if where == "cpu" else "a scratch file"
            logger.info("%.3g GB of the state of the optimizer rest in %s until the next step", size / 1e9, name)

    @torch.no_grad()
    def bring_back(self, optimizers: Iterable[Optimizer] | None = None) -> None:
        """Move the state back to where it was, bit by bit as it was.

        Args:
            optimizers: those that are still in use; the state of others is let go. None for all.
        """
        used = None if optimizers is None else {id(tensor) for tensor in _tensors(optimizers)}
        while self._parked:
            tensor, device, stride = self._parked[-1]
            if used is None or id(tensor) in used:
                back = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=device)
                tensor.data = back.copy_(tensor)
            self._parked.pop()
        self.rests = False


def _tensors(optimizers: Iterable[Optimizer]) -> list[Tensor]:
    """Return the tensors in the state of optimizers, each once."""
    leaves = tree_leaves([list(optimizer.state.values()) for optimizer in optimizers])
    return list({id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}.values())


def _movable(optimizers: Iterable[Optimizer]) -> Iterator[Tensor]:
    """Yield the tensors of the state that can get other memory without an effect on anything else."""
    optimizers = list(optimizers)
    tensors = [t for t in _tensors(optimizers) if type(t) is Tensor and t.layout is torch.strided and not vars(t)]
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    plain = [p for p in parameters if type(p.data) is Tensor]
    owners = Counter(tensor.untyped_storage().data_ptr() for tensor in (*tensors, *plain))
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if tensor.numel() > 1 and storage.nbytes() == tensor.nbytes and owners[storage.data_ptr()] == 1:
            yield tensor


def _is_on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"
