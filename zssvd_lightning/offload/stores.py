"""Stores: makers of the mappings that hold tensors by layer, in memory or in a medium."""

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from functools import partial
from itertools import repeat
from typing import Any, Generic, TypeVar

from torch import Tensor

from zssvd_lightning.offload.media import Held, HostMemory, Medium, ScratchFile

V = TypeVar("V")


class Store:
    """Maker of the mappings that hold what a compression keeps by layer: dictionaries."""

    def tensors(self) -> MutableMapping[str, Tensor]:
        """Return an empty mapping of tensors."""
        return {}

    def tuples(self, whole: Callable[..., V]) -> MutableMapping[str, V]:
        """Return an empty mapping of values that `whole` makes of their tensors."""
        return {}


class Offloaded(MutableMapping[str, V], Generic[V, Held]):
    """Mapping whose values consist of tensors in a medium. Store a value again after a change in place.

    Args:
        maker: maker of the medium that holds the tensors.
        parts: function that takes a value apart into tensors.
        whole: function that makes a value of these tensors.
    """

    def __init__(
        self, maker: Callable[[], Medium[Held]], parts: Callable[[V], Sequence[Tensor]], whole: Callable[..., V]
    ) -> None:
        self._maker, self._parts, self._whole = maker, parts, whole
        self._medium = maker()
        self._held: dict[str, list[Held]] = {}
        self._shared = False

    def __getitem__(self, name: str) -> V:
        return self._whole(*map(self._medium.get, self._held[name]))

    def __setitem__(self, name: str, value: V) -> None:
        before = repeat(None) if self._shared or name not in self._held else self._held[name]
        self._held[name] = list(map(self._medium.put, self._parts(value), before))

    def __delitem__(self, name: str) -> None:
        del self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, name: object) -> bool:
        return name in self._held

    def __copy__(self) -> "Offloaded[V, Held]":
        """Return a mapping of the same values, which can then differ."""
        new = Offloaded(self._maker, self._parts, self._whole)
        new._medium = self._medium
        new._held |= {name: list(held) for name, held in self._held.items()}
        self._shared = new._shared = True
        return new

    def clear(self) -> None:
        """Remove all values without reading them, and free their space."""
        self._held.clear()
        self._medium, self._shared = self._maker(), False  # values that were read may still be mapped from the old one


class Offloading(Store):
    """Maker of mappings in a medium.

    Args:
        medium: maker of the medium of one mapping.
    """

    def __init__(self, medium: Callable[[], Medium[Any]]) -> None:
        self._medium = medium

    def tensors(self) -> MutableMapping[str, Tensor]:
        """Return an empty mapping of tensors."""
        return Offloaded(self._medium, lambda tensor: (tensor,), lambda tensor: tensor)

    def tuples(self, whole: Callable[..., V]) -> MutableMapping[str, V]:
        """Return an empty mapping of named tuples or dataclasses of tensors."""
        return Offloaded(self._medium, _tensors_of, whole)


OFFLOADS: dict[str, Callable[[], Store]] = {
    "none": Store,
    "cpu": partial(Offloading, HostMemory),
    "disk": partial(Offloading, ScratchFile),
}
"""Makers of stores, by the names that the setting `offload` accepts."""


def _tensors_of(value: Any) -> Sequence[Tensor]:
    return value if isinstance(value, tuple) else tuple(vars(value).values())
