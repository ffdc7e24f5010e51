"""Elements of HTML, in which all text is escaped, and numbers in words and units."""

import html
import math
from collections.abc import Iterable, Sequence

NOT_MEASURED = "not measured"
"""Text in place of a value that is missing or NaN."""


class Markup(str):
    """Text that is HTML already and is not escaped again."""

    __slots__ = ()


def element(tag: str, *content: str, **attributes: object) -> Markup:
    """Return an element. Text in it and values of attributes are escaped, and `Markup` is taken as it is.

    A trailing underscore in the name of an attribute is dropped, any other becomes a hyphen. An attribute that is None
    is left out.

    Example:
        >>> element("td", "a < b", class_="number", data_layer=3)
        '<td class="number" data-layer="3">a &lt; b</td>'
    """
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{tag}{written}>{joined(content)}</{tag}>")


def joined(parts: Iterable[str]) -> Markup:
    """Return parts as one. Text is escaped, and `Markup` is taken as it is."""
    return Markup("".join(part if isinstance(part, Markup) else html.escape(part) for part in parts))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int = 1) -> Markup:
    """Return a table, in a box that scrolls where the screen is narrower.

    Args:
        head: titles of the columns.
        rows: cells of each row, of which the first names the row.
        numbers_from: first column that is aligned to the right.
    """
    aligned = [None if column < numbers_from else "number" for column in range(len(head))]
    titles = [element("th", title, scope="col", class_=side) for title, side in zip(head, aligned, strict=True)]
    lines = [
        element(
            "tr",
            element("th", row[0], scope="row"),
            *(element("td", cell, class_=side) for cell, side in zip(row[1:], aligned[1:], strict=True)),
        )
        for row in rows
    ]
    whole = element("table", element("thead", element("tr", *titles)), element("tbody", *lines))
    return element("div", whole, class_="wide")


def section(title: str, *content: str, id_: str) -> Markup:
    """Return a section with a title."""
    return element("section", element("h2", title), *content, id=id_)


def paragraph(*content: str) -> Markup:
    """Return a paragraph."""
    return element("p", *content)


def missing(what: str) -> Markup:
    """Return a note that a part of the page is missing."""
    return element("p", f"Not in this report: {what}.", class_="missing")


def number(value: float | None, digits: int = 4) -> str:
    """Return a number with so many significant digits."""
    if value is None or math.isnan(value):
        return NOT_MEASURED
    if math.isinf(value):
        return "infinite" if value > 0 else "minus infinite"
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    if abs(value) < 1:
        return f"{value:.{digits}g}"
    return f"{value:,.{max(0, digits - len(str(int(abs(value)))))}f}"


def count(value: int | None) -> str:
    """Return a whole number."""
    return NOT_MEASURED if value is None else f"{value:,}"


def with_noun(value: int, noun: str) -> str:
    """Return a whole number of things, such as `1 window` or `16 batches`."""
    ending = "" if value == 1 else "es" if noun.endswith("ch") else "s"
    return f"{value:,} {noun}{ending}"


def percent(value: float | None) -> str:
    """Return a share as a percentage."""
    return NOT_MEASURED if value is None or math.isnan(value) else f"{value:.1%}"


def with_unit(value: float | None, unit: str) -> str:
    """Return an amount in thousands, millions or more of a unit, such as `538.1 MB`."""
    if value is None or not math.isfinite(value):
        return number(value)
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.4g} {prefix}{unit}"
    return f"{value:.4g} {unit}"


def duration(seconds: float | None) -> str:
    """Return a time in seconds, minutes or hours."""
    if seconds is None or not math.isfinite(seconds):
        return number(seconds)
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
