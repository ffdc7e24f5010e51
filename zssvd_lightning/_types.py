"""Checks of the types of settings against the annotations of their dataclass."""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from zssvd_lightning.errors import ConfigError, shown

LARGEST = 2**63 - 1
"""Largest absolute value of a whole number."""


MISFIT: Any = object()
"""Stands for a value that does not have the wanted type."""


WORDS = {
    Any: "anything",
    NoneType: "None",
    bool: "True or False",
    int: "a whole number of at most 64 bits",
    float: "a finite number",
    str: "text",
    Path: "a path",
}
"""Types of settings, as messages name them."""


LISTS = {Any: "a list", str: "a list of texts", int: "a list of whole numbers", float: "a list of finite numbers"}
"""Lists of simple types, as messages name them."""


def check_types(settings: Any, section: str = "") -> None:
    """Check every field of a settings dataclass against its annotation, and store the value in exactly that type.

    Scalars of NumPy and torch become numbers, whole numbers become floats where a float is wanted, paths become text, a
    tuple becomes a list, and a single text becomes a list where a list of texts is wanted. Nothing else is converted:
    text is no number, and True and False are not 1 and 0.

    Args:
        settings: instance of the dataclass, which may be frozen.
        section: start of the name of each field in messages, such as `model.`.

    Raises:
        ConfigError: a value has another type. The message names the field, the value and the type.
    """
    hints = get_type_hints(type(settings))
    for field in fields(settings):
        name = field.name
        object.__setattr__(settings, name, of_type(hints[name], getattr(settings, name), f"{section}{name}"))


def of_type(hint: Any, value: Any, name: str) -> Any:
    """Return a value in the type of an annotation, as `check_types` does for a field.

    Raises:
        ConfigError: the value has another type.
    """
    fitted = _fitted(hint, value)
    if fitted is MISFIT:
        raise ConfigError(
            f"{name} is {shown(value)} ({type(value).__name__}), but must be {described(hint)}" + _remedy(hint, value)
        )
    return fitted


def described(hint: Any) -> str:
    """Return the values that an annotation allows, in words."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(described(part) for part in parts))
    if origin is list:
        return LISTS.get(parts[0]) or f"a list whose values are each {described(parts[0])}"
    if origin is dict:
        return "a mapping"
    if origin is not None and issubclass(origin, Callable):  # type: ignore[arg-type]
        return "a function"
    return WORDS.get(hint) or f"a {hint.__name__}"


def _fitted(hint: Any, value: Any) -> Any:
    """Return the value in the type of an annotation, or MISFIT."""
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, UnionType):
        candidates = (_fitted(part, value) for part in parts)
        return next((fitted for fitted in candidates if fitted is not MISFIT), MISFIT)
    if origin is list:
        return _list(parts[0], value)
    if origin is dict:
        return _mapping(parts[1], value)
    if origin is not None:
        return value if isinstance(value, origin) else MISFIT
    return SIMPLE[hint](value) if hint in SIMPLE else value if isinstance(value, hint) else MISFIT


def _list(hint: Any, value: Any) -> Any:
    if isinstance(value, str) and hint is str:
        return [value]
    if not isinstance(value, list | tuple):
        return MISFIT
    items = [_fitted(hint, item) for item in value]
    return MISFIT if any(item is MISFIT for item in items) else items


def _mapping(hint: Any, value: Any) -> Any:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return MISFIT
    items = {key: _fitted(hint, item) for key, item in value.items()}
    return MISFIT if any(item is MISFIT for item in items.values()) else items


def _plain(value: Any) -> Any:
    """Return the plain number of a scalar of NumPy or torch; other values as they are."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        try:
            return value.item()
        except RuntimeError:  # a tensor without data
            return MISFIT
    return value


def _bool(value: Any) -> Any:
    value = _plain(value)
    return value if isinstance(value, bool) else MISFIT


def _int(value: Any) -> Any:
    value = _plain(value)
    if not isinstance(value, Integral) or isinstance(value, bool):
        return MISFIT
    number = int(value)
    return number if abs(number) <= LARGEST else MISFIT


def _float(value: Any) -> Any:
    value = _plain(value)
    if not isinstance(value, Real) or isinstance(value, bool):
        return MISFIT
    try:
        number = float(value)
    except OverflowError:
        return MISFIT
    return number if math.isfinite(number) else MISFIT


def _str(value: Any) -> Any:
    if isinstance(value, str):
        return str.__str__(value)
    return str(value) if isinstance(value, os.PathLike) else MISFIT


def _path(value: Any) -> Any:
    return Path(value) if isinstance(value, str | os.PathLike) else MISFIT


SIMPLE: Mapping[Any, Callable[[Any], Any]] = {bool: _bool, int: _int, float: _float, str: _str, Path: _path}
"""Functions that return a value in a simple type, or MISFIT."""


def _remedy(hint: Any, value: Any) -> str:
    """Return what to write instead, where a value is one of the wanted type but for its quotes."""
    parts = (hint, *get_args(hint))
    if isinstance(value, str) and (int in parts or float in parts):
        try:
            float(value)
        except ValueError:
            return ""
        return f"; write {value.strip()} without quotes"
    if isinstance(value, int | float) and not isinstance(value, bool) and str in parts:
        return f"; write '{value}' in quotes"
    return ""
