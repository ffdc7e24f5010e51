"""Layers that read the same input tensor, and so share one second moment."""

import weakref
from collections import Counter
from collections.abc import Callable

from torch import Tensor

from zssvd_lightning.errors import CalibrationError
from zssvd_lightning.whitening.moments import Moments


class SharedInputs:
    """The inputs of all layers in one batch, added to the second moments once for each tensor.

    Args:
        moments: receives the second moments, and the leader of each layer.
    """

    def __init__(self, moments: Moments) -> None:
        self._moments = moments
        self._latest: dict[str, weakref.ref[Tensor]] = {}
        self._order: dict[str, int] = {}
        self._readers: dict[int, list[str]] = {}
        self._followers = Counter(leader for name, leader in moments.leaders.items() if leader != name)
        self._calls: dict[str, int] = {}
        self._before: dict[str, tuple[Tensor, int]] = {}

    def add(self, name: str, X: Tensor, rows: Callable[[], Tensor]) -> None:
        """Add an input to the second moment of a layer or, if another one has read it too, of that leader.

        A layer that stops sharing in the batch in which it began, as where one attention is to itself and then to
        others, goes on with a copy of the leader's second moment from before.

        Args:
            name: the layer.
            X: the tensor that it reads.
            rows: function that returns the rows (T, n) of X that count.

        Raises:
            CalibrationError: the layer stops sharing an input later than that.
        """
        leaders, calls = self._moments.leaders, self._calls
        readers = [leader for leader in self._readers.get(id(X), ()) if self._latest[leader]() is X]
        if name not in leaders:
            leaders[name] = min(readers, key=self._order.__getitem__, default=name)
            calls[name] = 0
            self._followers.update([leaders[name]] * (leaders[name] != name))
        leader = leaders[name]
        if leader != name and (leader not in self._latest or self._latest[leader]() is not X):
            if leader not in self._before or calls.get(name) != calls[leader] - 1:
                raise CalibrationError(
                    f"{name} read the same input as {leader} in its first call, but another one in a later call; "
                    f"compress them in separate runs, or add {name} to ignore"
                )
            self._moments.part(name, *self._before[leader])
            self._followers[leader] -= 1
        if leaders[name] == name:
            if calls.get(name) and self._followers[name]:
                self._before[name] = self._moments.input_sums[name].clone(), self._moments.tokens[name]
            self._order.setdefault(name, len(self._order))
            self._latest[name] = weakref.ref(X)
            self._readers[id(X)] = [*(leader for leader in readers if leader != name), name]
            self._moments.add_inputs(name, rows())
        if name in calls:
            calls[name] += 1

    def done(self) -> None:
        """Drop the copies of second moments from before the latest inputs."""
        self._before.clear()
