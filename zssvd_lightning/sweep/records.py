"""Records of a sweep: calls of blocks, hidden states between them, and the gradients of these."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zssvd_lightning.calibration.masks import Masks, TokenMask
from zssvd_lightning.offload.media import InFile, ScratchFile
from zssvd_lightning.offload.stores import Store
from zssvd_lightning.sweep.calls import BlockCall
from zssvd_lightning.sweep.seal import Step

LOSS, DRAWN = "loss", "drawn"
"""Names of the gradients that are sent back: that of the loss, and that drawn from the logits."""


@dataclass
class Batch:
    """A batch of a sweep.

    Attributes:
        loss: function that runs the model on the batch and returns the mean loss.
        mask: mask of the batch.
        terms: number of terms in the mean loss.
        number: number of the batch, from 0.
        masks: masks of the layers, known after the first pass.
        calls: calls of the blocks.
        sides: places of the side tensors, by number.
        differentiable: numbers of the side tensors that need gradients.
    """

    loss: Callable[[], Tensor]
    mask: TokenMask
    terms: float
    number: int = 0
    masks: Masks = field(default_factory=lambda: Masks(None))
    calls: dict[Step, BlockCall] = field(default_factory=dict)
    sides: list[InFile] = field(default_factory=list)
    differentiable: set[int] = field(default_factory=set)


class _Side(NamedTuple):
    """A side tensor that is stored, with the number of changes in place before."""

    tensor: Tensor
    version: int
    place: InFile

    @property
    def is_unchanged(self) -> bool:
        """True if the tensor still is what was stored."""
        return self.tensor._version == self.version  # noqa: SLF001


class SideTensors:
    """File of the side tensors of all batches. What is equal in two batches in a row is stored once.

    Attributes:
        nbytes: bytes stored so far.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._file = ScratchFile()
        self._before: list[_Side] = []
        self._present: list[_Side] = []

    def start(self) -> None:
        """Start the next batch."""
        self._before, self._present = self._present, []

    def number_of(self, tensor: Tensor) -> int:
        """Return the number of a tensor in the present batch, and store it if it is new."""
        version = tensor._version  # noqa: SLF001  one more after each change in place
        for number, known in enumerate(self._present):
            if known.tensor is tensor and known.version == version:
                return number
        number = len(self._present)
        before = self._before[number] if number < len(self._before) else None
        same = before is not None and before.is_unchanged and _equal(before.tensor, tensor)
        if before is not None and same:
            place = before.place
        else:
            place = self._file.put(tensor, None)
            self.nbytes += tensor.nbytes
        self._present.append(_Side(tensor, version, place))
        return number

    @property
    def places(self) -> list[InFile]:
        """Places of the tensors of the present batch, by number."""
        return [side.place for side in self._present]

    @property
    def differentiable(self) -> set[int]:
        """Numbers of the tensors of the present batch that require gradients."""
        return {number for number, side in enumerate(self._present) if side.tensor.requires_grad}

    def forget(self) -> None:
        """Release the tensors of the last batch, which are in the file."""
        self._before, self._present = [], []

    def read(self, place: InFile) -> Tensor:
        """Return a stored tensor."""
        return self._file.get(place)


def _equal(one: Tensor, other: Tensor) -> bool:
    same_kind = (one.device, one.dtype, one.shape) == (other.device, other.dtype, other.shape)
    return same_kind and torch.equal(one, other)


class Streams:
    """Tensors of all batches, in one file for each key of what they belong to, removed when it is done.

    Args:
        store: maker of the files.
    """

    def __init__(self, store: Store) -> None:
        self._files: dict[Hashable, MutableMapping[str, Tensor]] = defaultdict(store.tensors)

    def put(self, key: Hashable, entry: str, tensor: Tensor) -> None:
        """Store a tensor."""
        self._files[key][entry] = tensor

    def get(self, key: Hashable, entry: str) -> Tensor | None:
        """Return a stored tensor; None if there is none."""
        return self._files[key].get(entry) if key in self._files else None

    def close(self, key: Hashable) -> None:
        """Remove all tensors of a key."""
        self._files.pop(key, None)

    def state_dict(self) -> dict[Hashable, dict[str, list[Any]]]:
        """Return all tensors in host memory, each with the name of its device, by key and entry."""
        return {key: {name: _on_host(held[name]) for name in held} for key, held in self._files.items()}

    def load_state_dict(self, state: Mapping[Hashable, Mapping[str, Sequence[Any]]]) -> None:
        """Replace all tensors by those of a `state_dict`."""
        self._files.clear()
        for key, held in state.items():
            for name, (tensor, device) in held.items():
                self.put(key, name, tensor.to(device))


def _on_host(tensor: Tensor) -> list[Any]:
    return [tensor.cpu(), str(tensor.device)]


class Gradients(Streams):
    """Gradients that have been sent back so far, of all batches."""

    def at(self, key: Hashable, batch: Batch) -> Callable[[str], Tensor | None]:
        """Return a function that returns the gradient of a batch, that of the loss or the drawn one; None for 0."""
        return lambda sent: self.get(key, f"{sent} {batch.number}")

    def receiver(self, batch: Batch) -> "Receiver":
        """Return a receiver of gradients of a batch."""
        return Receiver(self, batch)


@dataclass
class Receiver:
    """Receiver of gradients during a backward pass."""

    gradients: Gradients
    batch: Batch
    sent: str = LOSS
    """Gradient that is being sent back: `LOSS` or `DRAWN`."""

    def receive(self, key: Hashable, gradient: Tensor) -> None:
        """Add a gradient to what has come back to `key`."""
        before = self.gradients.at(key, self.batch)(self.sent)
        entry = f"{self.sent} {self.batch.number}"
        self.gradients.put(key, entry, gradient if before is None else before + gradient)
