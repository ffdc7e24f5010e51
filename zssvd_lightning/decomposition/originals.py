"""Copies of the weights before the first truncation: creation, restoration and checkpoints."""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from zssvd_lightning.distributed import LayerSet
from zssvd_lightning.errors import CheckpointError


class Originals(Mapping[str, Tensor]):
    """Original weights (m, n) by layer name, or this process's part of them; empty until the first `keep`.

    Weights that were not changed yet are those of the model, and are not held a second time. Nor are those of targets
    that are changed in a scratch file, since what they were stays what it was.

    Args:
        layers: the layers and the processes that hold them.
        held: empty mapping that stores the weights; None for a dictionary.
    """

    def __init__(self, layers: LayerSet, held: MutableMapping[str, Tensor] | None = None) -> None:
        self._targets, self._team = layers, layers.team
        self._held: MutableMapping[str, Tensor] = {} if held is None else held
        self._unchanged: dict[str, Tensor] = {}
        self._begun = False

    def __getitem__(self, name: str) -> Tensor:
        """Return this process's part of the original weight of a layer, which may be that in the model."""
        if name in self._unchanged:
            return self._targets[name].oriented(self._unchanged[name])
        return self._held[name] if name in self._held else self._targets[name].weight

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the layers."""
        return iter(self._targets if self._begun else ())

    def __len__(self) -> int:
        """Return the number of layers; 0 before the first `keep`."""
        return len(self._targets) if self._begun else 0

    @property
    def copies(self) -> list[str]:
        """Names of the layers whose weights are held beside the model."""
        return [*self._held, *self._unchanged]

    @torch.no_grad()
    def keep(self, names: Iterable[str] | None = None) -> None:
        """Copy weights in their own type, unless copies exist already. Call it before they change.

        Where processes have parts of the weights, all are copied, because a pass may put whole weights in their place.

        Args:
            names: layers that are about to change; None for all.
        """
        self._begun = True
        for name in self._targets if names is None or not self._team.whole_everywhere else names:
            target = self._targets[name]
            if target.file is not None:
                self._unchanged.setdefault(name, target.module.weight.data)
            elif name not in self._held:
                self._held[name] = target.weight.clone()

    @torch.no_grad()
    def put_back_into(self, name: str) -> None:
        """Set the weight of a layer in the model to the original one."""
        if name in self._unchanged:
            self._targets[name].put_back(self._unchanged[name])
        elif name in self._held:
            self._targets[name].assign(self._held[name])

    @torch.no_grad()
    def put_back(self) -> None:
        """Overwrite the weights of the model with the stored copies, and drop the copies."""
        for name in self.copies:
            self.put_back_into(name)
        self._held.clear()
        self._unchanged.clear()
        self._begun = False

    def state_dict(self) -> dict[str, Tensor] | None:
        """Return the whole weights of all layers in the form the team saves; None before `keep`. Collective."""
        if not self._begun:
            return None
        to_save = {}
        for name, target in self._targets.items():
            kept = name in self._held or name in self._unchanged
            own = self[name] if kept else target.weight.clone()  # the model may change later
            W = self._team.weight_to_save(own, target.shape[target.split], target.split)
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
        self._unchanged.clear()
        self._begun = state is not None
        for name, W in (state or {}).items():
            target = self._targets[name]
            self._held[name] = self._team.part(W, target.split).to(target.weight.device, copy=True)
