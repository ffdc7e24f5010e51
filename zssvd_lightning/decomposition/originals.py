"""Copies of the weights before the first truncation: creation, restoration and checkpoints."""

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from zssvd_lightning.distributed import LayerSet
from zssvd_lightning.errors import CheckpointError


class Originals(Mapping[str, Tensor]):
    """Original weights (m, n) by layer name, or this process's part of them; empty until `keep` copies them.

    Args:
        layers: the layers and the processes that hold them.
        held: empty mapping that stores the weights; None for a dictionary.
    """

    def __init__(self, layers: LayerSet, held: MutableMapping[str, Tensor] | None = None) -> None:
        self._targets, self._team = layers, layers.team
        self._held: MutableMapping[str, Tensor] = {} if held is None else held

    def __getitem__(self, name: str) -> Tensor:
        """Return this process's part of the original weight of a layer."""
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the layers."""
        return iter(self._held)

    def __len__(self) -> int:
        """Return the number of stored weights: one for every layer, or 0."""
        return len(self._held)

    @torch.no_grad()
    def keep(self) -> None:
        """Copy all weights, unless copies exist already."""
        if not self._held:
            for name, target in self._targets.items():
                self._held[name] = target.weight.clone()

    @torch.no_grad()
    def put_back(self) -> None:
        """Overwrite the weights of the model with the stored copies, and drop the copies."""
        for name, W in self._held.items():
            self._targets[name].assign(W)
        self._held.clear()

    def state_dict(self) -> dict[str, Tensor] | None:
        """Return the whole weights in the form the team saves; None if nothing is stored. Collective."""
        if not self._held:
            return None
        to_save = {}
        for name, target in self._targets.items():
            W = self._team.weight_to_save(self._held[name], target.shape[target.split], target.split)
            if W is not None:
                to_save[name] = W
        return to_save

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Load this process's part of the weights in a `state_dict`.

        Raises:
            CheckpointError: the state contains the weights of other layers.
        """
        if differing := sorted(() if state is None else state.keys() ^ self._targets.keys()):
            raise CheckpointError(
                f"the checkpoint was taken while layers were being replaced ({', '.join(differing[:3])}); resume from "
                "another one"
            )
        self._held.clear()
        for name, W in (state or {}).items():
            target = self._targets[name]
            self._held[name] = self._team.part(W, target.split).to(target.weight.device, copy=True)
