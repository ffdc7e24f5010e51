"""Weights of layers that lose hidden units, and the narrower layers that replace them.

Shapes: hidden width of h units, of which w remain; W (p, h) of the layer that reads them, M (p, w) of what replaces it.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from zssvd_lightning.decomposition.originals import Originals
from zssvd_lightning.distributed import LayerSet
from zssvd_lightning.errors import NonFiniteError
from zssvd_lightning.layers.base import Dense, carry_hooks
from zssvd_lightning.layers.narrow import NarrowLinear
from zssvd_lightning.selection.components import Narrowed


class Reader(NamedTuple):
    """Layer that reads a hidden width with fewer units."""

    narrowed: Narrowed
    """The width."""
    weight: Tensor
    """Weight M (p, w), in the type of the model."""


class NarrowedWeights:
    """Weights of all layers that lose hidden units. Every process holds them whole.

    Until `layers` are made, the model keeps its sizes: the layer that reads a width has zeros for the units that are
    gone, and those that write it are as they were.

    Args:
        layers: the layers and the processes that hold them.

    Attributes:
        readers: the layers that read a narrower width, by name.
    """

    def __init__(self, layers: LayerSet) -> None:
        self._targets, self._team = layers, layers.team
        self.readers: dict[str, Reader] = {}

    def take(self, name: str, narrowed: Narrowed, owner: int, weight: Tensor | None) -> None:
        """Store the weight M of a layer, which only process `owner` passes; the others pass None. Collective.

        Raises:
            NonFiniteError: it contains NaN or infinite values.
        """
        target = self._targets[name]
        shape = target.shape[0], len(narrowed.units)
        M = self._team.from_owner(owner, weight, shape, target.weight.new_empty(0))
        if not M.isfinite().all():
            raise NonFiniteError(
                f"the weight of {name} {target.shape} without {target.shape[1] - shape[1]} hidden units holds NaN or "
                "infinite values; calibrate on more tokens, or leave narrow out"
            )
        self.readers[name] = Reader(narrowed, M)

    def put_back(self, name: str, originals: Originals) -> None:
        """Set the weight (m, n) of a layer that is not low-rank: without hidden units, or the original one."""
        if name not in self.readers:
            originals.put_back_into(name)
            return
        (_, units), M = self.readers[name]
        W = M.new_zeros(self._targets[name].shape)
        self._targets[name].assign(W.index_copy_(1, units.to(M.device), M))

    def layers(self) -> Iterator[tuple[str, NarrowLinear]]:
        """Yield the name and the narrower layer of each layer that meets in such a width."""
        for name, ((producers, units), M) in self.readers.items():
            for producer in producers:
                old = self._targets[producer].module
                rows = units.to(old.weight.device)
                bias = None if old.bias is None else old.bias.detach()[rows]
                yield producer, _narrow_layer(old, self._targets[producer].weight[rows], bias)
            old = self._targets[name].module
            yield name, _narrow_layer(old, M, None if old.bias is None else old.bias.detach())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights M by layer name, in the form the team saves. Collective."""
        saved = {n: self._team.weight_to_save(M, len(M)) for n, (_, M) in self.readers.items()}
        return {name: M for name, M in saved.items() if M is not None}

    def load_state_dict(self, state: Mapping[str, Tensor], narrowed: Mapping[str, Narrowed]) -> None:
        """Load a `state_dict`, of the widths in a selection."""
        self.readers = {
            name: Reader(narrowed[name], M.to(self._targets[name].weight, copy=True)) for name, M in state.items()
        }


@torch.no_grad()
def _narrow_layer(old: Dense, weight: Tensor, bias: Tensor | None) -> NarrowLinear:
    """Return the layer with a weight (p, q) that replaces `old`. Flags, training mode and hooks carry over."""
    (p, q) = weight.shape
    new = NarrowLinear.like(old, inputs=q, outputs=p).to_empty(device=weight.device)
    new.fill(weight, bias)
    carry_hooks(new, old)
    return new
