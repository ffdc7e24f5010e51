"""Running sum of the sensitivities that a greedy rule drops one after another, at a bounded number of points."""

from typing import Any

LIMIT = 128
"""Number of points from which pairs of neighbors are merged, so that there are never more than twice as many."""


class Walk:
    """Running sum of the dropped sensitivities (nats), removal by removal.

    Each point stands for the same number of removals and holds the lowest and the highest sum within them.

    Attributes:
        removals: number of components dropped.
        total: running sum after the last of them.
        length: sum of the absolute sensitivities, which is how far the sum would be if all had one sign.
        stride: number of removals of a point; the last point may have fewer.
    """

    def __init__(self) -> None:
        self.removals = 0
        self.total = 0.0
        self.length = 0.0
        self.stride = 1
        self._points: list[tuple[float, float]] = []

    def add(self, delta: float) -> None:
        """Add one removal."""
        self.total += delta
        self.length += abs(delta)
        if self.removals % self.stride == 0:
            if len(self._points) == 2 * LIMIT:
                self._merge()
            self._points.append((self.total, self.total))
        else:
            lowest, highest = self._points[-1]
            self._points[-1] = min(lowest, self.total), max(highest, self.total)
        self.removals += 1

    def to_dict(self) -> dict[str, Any]:
        """Return plain types for `report.json`."""
        return {
            "removals": self.removals,
            "stride": self.stride,
            "lowest": [float(f"{lowest:.5g}") for lowest, _ in self._points],
            "highest": [float(f"{highest:.5g}") for _, highest in self._points],
            "total": self.total,
            "length": self.length,
        }

    def _merge(self) -> None:
        pairs = zip(self._points[::2], self._points[1::2], strict=True)
        self._points = [(min(a[0], b[0]), max(a[1], b[1])) for a, b in pairs]
        self.stride *= 2
