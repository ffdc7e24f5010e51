"""The layers that are compressed together, and the processes that hold them."""

from collections.abc import Collection, Iterator, Mapping
from typing import TypeVar

import torch

from zssvd_lightning.distributed.team import Team
from zssvd_lightning.model.targets import Target

T = TypeVar("T")


class LayerSet(Mapping[str, Target]):
    """Layers by qualified name, in module order, with the team of processes that compresses them.

    Args:
        targets: the layers.
        team: the processes; this one alone when None.
    """

    def __init__(self, targets: Mapping[str, Target], team: Team | None = None) -> None:
        self._targets = dict(targets)
        self.team = team or Team()

    def __getitem__(self, name: str) -> Target:
        return self._targets[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __len__(self) -> int:
        return len(self._targets)

    @property
    def device(self) -> torch.device:
        """Device of the first layer."""
        return next(iter(self.values())).weight.device

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Shape (m, n) of each layer."""
        return {name: target.shape for name, target in self.items()}

    def leave_out(self, names: Collection[str]) -> None:
        """Remove layers, here and for everyone who holds this set."""
        for name in names:
            del self._targets[name]

    def without(self, names: Collection[str]) -> "LayerSet":
        """Return a set of the same team without some layers."""
        return LayerSet({name: target for name, target in self.items() if name not in names}, self.team)

    def of_all_processes(self, own: Mapping[str, T]) -> dict[str, T]:
        """Return what every process has for its layers, in one dictionary. Collective."""
        return {name: value for theirs in self.team.gathered(own) for name, value in theirs.items()}
