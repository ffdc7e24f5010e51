"""Required form of the state of a compression in a checkpoint."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from zssvd_lightning._state_checks import (
    Check,
    FaultError,
    anything,
    entries,
    fault,
    finite,
    finite_tensor,
    listed,
    mapped,
    number,
    optional,
    shaped,
    tensor,
    text,
    whole,
    yes_or_no,
)
from zssvd_lightning.serialization.report_content import SIZES, TRACE

IMPORTANCES = optional(mapped(listed(finite_tensor, 2)))
"""Importance of outputs and inputs of each layer."""


def _moments(sums: Check) -> Check:
    return entries(
        {
            "leaders": mapped(text),
            "input_sums": mapped(finite_tensor),
            "tokens": mapped(whole),
            "gradient_sums": mapped(sums),
            "output_sums": mapped(sums),
            "output_terms": finite,
            "loss_sum": finite,
            "loss_terms": finite,
            "batches": whole,
            "with_gradient": listed(text),
            "with_outputs": listed(text),
            "component_sums": mapped(sums),
            "output_side": optional(text),
            "removal_sums": mapped(sums),
        },
        ("removal_sums",),
    )


FACTORS = mapped(listed(finite_tensor, 2))


def _narrowed(value: Any, key: str) -> None:
    """Check an entry of `Selection.narrowed` in its state."""
    if not isinstance(value, list) or len(value) != 2:
        raise fault(key, value, "layers and remaining units of a hidden width")
    listed(text)(value[0], f"{key}[0]")
    listed(whole)(value[1], f"{key}[1]")


SELECTION = optional(
    entries(
        {
            "kept": mapped(optional(listed(whole))),
            "drifts": mapped(number),
            "eight_bit": listed(text),
            "narrowed": mapped(_narrowed),
        },
        ("narrowed",),  # not in checkpoints of earlier releases
    )
)


SAFEGUARD = optional(
    entries(
        {
            "batches": listed(optional(listed(anything))),
            "dense": optional(finite),
            "truncated": optional(finite),
            "best": number,
            "taken_back": whole,
            "trust": finite,
            "judged": whole,
            "factors": optional(FACTORS),
            "selection": SELECTION,
            "importances": IMPORTANCES,
        }
    )
)


COMPONENTS = entries(
    {
        "sigma": finite_tensor,
        "delta": finite_tensor,
        "rounding": optional(finite_tensor),
        "rounding_dense": optional(finite),
        "curvature": optional(finite_tensor),
    }
)


def _width(value: Any, key: str) -> None:
    """Check an entry of `FreeWidths.state_dict`."""
    if not isinstance(value, list) or len(value) != 3:
        raise fault(key, value, "producers, consumer and verdict of a hidden width")
    listed(text)(value[0], f"{key}[0]")
    text(value[1], f"{key}[1]")
    yes_or_no(value[2], f"{key}[2]")


COMPRESSION = entries(
    {
        "config": mapped(anything),
        "shapes": mapped(SIZES),
        "left_dense": mapped(text),
        "model_parameters": whole,
        "gathering": entries(
            {
                "moments": _moments(finite_tensor),
                "window": _moments(tensor),  # with a loss scale, gradients of an open window may overflow
                "kept": optional(_moments(finite_tensor)),
                "pending": listed(listed(number, 2)),
                "gradients": mapped(tensor),
                "calls": listed(listed(anything, 3)),
            },
            ("kept",),
        ),
        "widths": listed(_width),
        "originals": optional(mapped(finite_tensor)),
        "factors": FACTORS,
        "narrowed": mapped(finite_tensor),
        "found": optional(mapped(entries({"left": finite_tensor, "right": finite_tensor, "components": COMPONENTS}))),
        "selection": SELECTION,
        "importances": IMPORTANCES,
        "step": optional(listed(number, 2)),
        "lengths": optional(mapped(anything)),
        "losses": listed(number),
        "fractions": listed(number),
        "truncations": whole,
        "truncation_loss": number,
        "trace": TRACE,
        "safeguard": SAFEGUARD,
        "seconds": mapped(number),
    },
    # not in checkpoints of earlier releases
    ("truncation_loss", "trace", "safeguard", "left_dense", "importances", "widths", "narrowed"),
)
"""`snapshot.state_of`."""


def check_compression(state: Any, key: str) -> None:
    """Check the state of a compression: its entries, and that its tensors are of the layers in `shapes`.

    Raises:
        FaultError: an entry is missing, of another form, or of another layer.
    """
    COMPRESSION(state, key)
    shapes: Mapping[str, list[int]] = state["shapes"]
    gathering, safeguard = state["gathering"], state.get("safeguard") or {}
    for name in ("moments", "window", "kept"):
        if (moments := gathering.get(name)) is not None:
            _check_moments(moments, shapes, f"{key}.gathering.{name}")
    _check_layers(gathering["gradients"], shapes, f"{key}.gathering.gradients", (0, 1))
    _check_layers(state["originals"] or {}, shapes, f"{key}.originals", (0, 1))
    for place, part in ((key, state), (f"{key}.safeguard", safeguard)):
        factors = part.get("factors") or {}
        _check_layers(factors, shapes, f"{place}.factors")
        for name, (up, down) in factors.items():
            (m, n), k = shapes[name], getattr(up, "shape", (0, 0))[-1]
            shaped(up, f"{place}.factors.{name}[0]", (m, k))
            shaped(down, f"{place}.factors.{name}[1]", (k, n))
        selection = part.get("selection") or {"kept": {}}
        _check_layers(selection["kept"], shapes, f"{place}.selection.kept")
        for name, kept in selection["kept"].items():
            if any(index >= min(shapes[name]) for index in kept or ()):
                raise FaultError(f"{place}.selection.kept.{name} has a component that the layer {shapes[name]} has not")
        _check_narrowed(selection.get("narrowed", {}), state.get("narrowed", {}), shapes, place, key)


def _check_narrowed(
    narrowed: Mapping[str, Any], weights: Mapping[str, Any], shapes: Mapping[str, list[int]], place: str, key: str
) -> None:
    """Check that the hidden widths of a selection are those of layers, and that there is a weight for each."""
    _check_layers(narrowed, shapes, f"{place}.selection.narrowed")
    for name, (producers, units) in narrowed.items():
        p, h = shapes[name]
        where = f"{place}.selection.narrowed.{name}"
        _check_layers(dict.fromkeys(producers), shapes, where)
        ascending = all(first < second for first, second in pairwise(units))
        if not units or not ascending or units[-1] >= h or any(shapes[producer][0] != h for producer in producers):
            raise FaultError(f"{where} has no ascending numbers of the {h} units of {shapes[name]}")
        if name not in weights:
            raise FaultError(f"{key}.narrowed.{name} is missing")
        shaped(weights[name], f"{key}.narrowed.{name}", (p, len(units)))


def _check_moments(moments: Mapping[str, Any], shapes: Mapping[str, list[int]], key: str) -> None:
    _check_layers(moments["leaders"], shapes, f"{key}.leaders")
    _check_layers(moments["input_sums"], shapes, f"{key}.input_sums", (1, 1))
    _check_layers(moments["gradient_sums"], shapes, f"{key}.gradient_sums", (0, 1))
    _check_layers(moments["output_sums"], shapes, f"{key}.output_sums", (0, 0))
    _check_layers(moments["component_sums"], shapes, f"{key}.component_sums")
    for name, leader in moments["leaders"].items():
        if leader not in shapes:
            raise FaultError(f"{key}.leaders.{name} is {leader!r}, which is no layer of the compression")


def _check_layers(
    values: Mapping[str, Any], shapes: Mapping[str, list[int]], key: str, sides: tuple[int, ...] = ()
) -> None:
    """Check that all names are layers and, with `sides`, that the values have the shape of these sides of each."""
    for name, value in values.items():
        if name not in shapes:
            raise FaultError(f"{key} has {name}, which is no layer of the compression")
        if sides:
            shaped(value, f"{key}.{name}", tuple(shapes[name][side] for side in sides))
