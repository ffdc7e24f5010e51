"""The weights as they were before the first truncation: kept, put back, and carried through checkpoints."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from zssvd_lightning.distributed import LayerSet
from zssvd_lightning.errors import CheckpointError


class Originals(Mapping[str, Tensor]):
    """What this process holds of the original weights (m, n), by layer; empty until they are kept.

    Args:
        layers: the layers and the processes that hold them.
    """

    def __init__(self, layers: LayerSet) -> None:
        self._targets, self._team = layers, layers.team
        self._held: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        """What this process holds of a layer's weight."""
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        """Names of the layers."""
        return iter(self._held)

    def __len__(self) -> int:
        """How many weights are kept: of all layers or none."""
        return len(self._held)

    @torch.no_grad()
    def keep(self) -> None:
        """Takes a copy of all weights, unless there is one."""
        if not self._held:
            self._held = {name: target.weight.clone() for name, target in self._targets.items()}

    @torch.no_grad()
    def put_back(self) -> None:
        """Overwrites the weights of the model with those kept, and keeps them no longer."""
        for name, W in self._held.items():
            self._targets[name].assign(W)
        self._held = {}

    def state_dict(self) -> dict[str, Tensor] | None:
        """The whole weights as the team saves them; None when there are none. Collective."""
        if not self._held:
            return None
        to_save = {}
        for name, target in self._targets.items():
            W = self._team.weight_to_save(self._held[name], target.shape[target.split], target.split)
            if W is not None:
                to_save[name] = W
        return to_save

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Takes what this process is to hold of a `state_dict`.

        Raises:
            CheckpointError: it has the weights of other layers.
        """
        if differing := sorted(() if state is None else state.keys() ^ self._targets.keys()):
            raise CheckpointError(
                f"the checkpoint was taken while layers were being replaced ({', '.join(differing[:3])}); resume from "
                "another one"
            )
        self._held = {}
        for name, W in (state or {}).items():
            target = self._targets[name]
            self._held[name] = self._team.part(W, target.split).to(target.weight.device, copy=True)
