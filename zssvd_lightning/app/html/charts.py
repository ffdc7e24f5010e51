"""Charts in SVG: axes with ticks and titles, lines, bands, bars and marks. Colors are classes of the style sheet."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from zssvd_lightning.app.html.markup import Markup, element, joined

WIDTH, HEIGHT = 440, 250
"""Size of a chart in its own units. The page scales it to the column, which is about as wide."""


LEFT, RIGHT, TOP, BOTTOM = 62, 12, 26, 44
"""Margins around the plot, for the labels."""


CHARACTER = 8.2
"""Width of a character of a label."""


Point = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """Range and title of an axis."""

    title: str
    low: float
    high: float
    log: bool = False
    ticks: Sequence[tuple[float, str]] | None = None
    """Positions and labels; chosen from the range when None."""

    @classmethod
    def over(cls, title: str, values: Iterable[float], *, log: bool = False) -> "Axis":
        """Return an axis over the finite ones of `values`, with some room."""
        finite = [value for value in values if math.isfinite(value) and (value > 0 or not log)] or [1.0]
        low, high = min(finite), max(finite)
        if log:
            return cls(title, low / 1.15, high * 1.15, log=True)
        room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
        return cls(title, low - room if low < 0 else max(0.0, low - room), high + room)

    def place(self, value: float) -> float:
        """Return where a value is on the axis, from 0 to 1."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def labels(self) -> Sequence[tuple[float, str]]:
        """Return positions and labels of the ticks."""
        if self.ticks is not None:
            return self.ticks
        values = _log_ticks(self.low, self.high) if self.log else _ticks(self.low, self.high)
        return [(value, label(value)) for value in values]


def label(value: float) -> str:
    """Return a short label of a tick."""
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.2g}".split("e") if "e" in f"{value:.2g}" else f"{value:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.6g}"


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) + 0.0 for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        found = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
        if len(found) >= 3:
            return found[:: -(-len(found) // 8)]
    return _ticks(low, high, 4)


@dataclass
class Chart:
    """Chart with two axes. Points are in units of the axes, and those that are not finite are left out."""

    x: Axis
    y: Axis
    description: str
    """Alternative text."""
    _parts: list[str] = field(default_factory=list)
    _boxes: list[tuple[float, float, float, float]] = field(default_factory=list)

    def line(self, points: Sequence[Point], kind: str) -> None:
        """Add a line."""
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in map(self._at, filter(_finite, points)))
        if path:
            self._parts.append(element("path", d=f"M{path}", class_=f"line {kind}"))

    def band(self, lower: Sequence[Point], upper: Sequence[Point], kind: str) -> None:
        """Add the area between two lines."""
        around = [*filter(_finite, upper), *reversed([*filter(_finite, lower)])]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in map(self._at, around))
        if path:
            self._parts.append(element("path", d=f"M{path}Z", class_=f"band {kind}"))

    def bar(self, left: float, right: float, low: float, high: float, kind: str, hint: str) -> None:
        """Add a bar from `low` to `high`."""
        (x, bottom), (end, top) = self._at((left, low)), self._at((right, high))
        size = {"x": f"{x:.1f}", "y": f"{top:.1f}", "width": f"{end - x:.1f}", "height": f"{bottom - top:.1f}"}
        self._parts.append(element("rect", element("title", hint), class_=f"bar {kind}", **size))

    def mark(self, point: Point, kind: str, hint: str) -> None:
        """Add a mark: a `dot`, `ring`, `diamond` or `cross`, as the first word of `kind` says."""
        if not _finite(point):
            return
        x, y = self._at(point)
        self._boxes.append((x - 6, y - 6, x + 6, y + 6))
        shapes = {
            "dot": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0Z",
            "ring": "M-7 0a7 7 0 1 0 14 0a7 7 0 1 0 -14 0Z",
            "diamond": "M0 -6L6 0L0 6L-6 0Z",
            "cross": "M-5 -5L5 5M-5 5L5 -5",
        }
        where = f"translate({x:.1f} {y:.1f})"
        shape = shapes[kind.split(maxsplit=1)[0]]
        self._parts.append(element("path", element("title", hint), d=shape, transform=where, class_=f"mark {kind}"))

    def note(self, point: Point, text: str) -> None:
        """Add a label beside a point, where it covers neither marks nor other labels if there is such a place."""
        x, y = self._at(point)
        width, places = CHARACTER * len(text), []
        for dx, dy in (
            (9, 4),
            (-9 - width, 4),
            (-width / 2, -10),
            (-width / 2, 19),
            (9, -10),
            (9, 19),
            (9, 34),
            (9, -25),
        ):
            box = (x + dx, y + dy - 11, x + dx + width, y + dy + 3)
            inside = box[0] >= LEFT and box[2] <= WIDTH and box[1] >= 0 and box[3] <= HEIGHT - BOTTOM
            places.append((sum(_overlap(box, other) for other in self._boxes) + (0 if inside else 1e6), box, dx, dy))
        _, box, dx, dy = min(places, key=lambda place: place[0])
        self._boxes.append(box)
        self._parts.append(element("text", text, x=f"{x + dx:.1f}", y=f"{y + dy:.1f}", class_="note"))

    def drawn(self) -> Markup:
        """Return the chart as SVG."""
        size = f"0 0 {WIDTH} {HEIGHT}"
        content = (*self._grid(), element("g", *self._parts))
        return element("svg", *content, viewBox=size, role="img", aria_label=self.description, class_="chart")

    def _at(self, point: Point) -> Point:
        """Return the position of a point; one beyond an end of an axis is at the end."""
        across, up = (min(1.0, max(0.0, axis.place(v))) for axis, v in zip((self.x, self.y), point, strict=True))
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    def _grid(self) -> list[Markup]:
        floor, parts = HEIGHT - BOTTOM, []
        for value, text in self.y.labels():
            _, y = self._at((self.x.low, value))
            parts.append(element("path", d=f"M{LEFT} {y:.1f}H{WIDTH - RIGHT}", class_="grid"))
            parts.append(element("text", text, x=LEFT - 6, y=f"{y + 4:.1f}", class_="tick end"))
        end = -math.inf
        for value, text in self.x.labels():
            x, _ = self._at((value, self.y.low))
            half = CHARACTER * len(text) / 2
            parts.append(element("path", d=f"M{x:.1f} {floor}v4", class_="axis"))
            if x - half > end + 4:  # labels that would touch the one before are left out
                middle = min(x, WIDTH - half)
                parts.append(element("text", text, x=f"{middle:.1f}", y=floor + 18, class_="tick middle"))
                end = middle + half
        parts.append(element("path", d=f"M{LEFT} {floor}H{WIDTH - RIGHT}", class_="axis"))
        center = (LEFT + WIDTH - RIGHT) / 2
        parts.append(element("text", self.x.title, x=f"{center:g}", y=HEIGHT - 8, class_="title middle"))
        parts.append(element("text", self.y.title, x=2, y=14, class_="title"))
        return parts


def _finite(point: Point) -> bool:
    return all(map(math.isfinite, point))


def _overlap(box: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> float:
    """Return the area that two boxes (left, top, right, bottom) share."""
    across = min(box[2], other[2]) - max(box[0], other[0])
    down = min(box[3], other[3]) - max(box[1], other[1])
    return max(0.0, across) * max(0.0, down)


def figure(title: str, chart: Markup, *below: str, legend: Sequence[tuple[str, str]] = ()) -> Markup:
    """Return a chart with its title, legend and explanation.

    Args:
        title: what is shown, of which model and text.
        chart: the chart.
        below: explanation under it.
        legend: class of the style sheet and meaning of each kind of line or mark.
    """
    keys = [element("span", element("i", class_=f"key {kind}"), meaning) for kind, meaning in legend]
    parts = [element("figcaption", title), chart]
    if keys:
        parts.append(element("p", *keys, class_="legend"))
    if below:
        parts.append(element("p", *below, class_="about"))
    return element("figure", joined(parts))
