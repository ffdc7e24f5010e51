"""What the state of a compression in a checkpoint, and its report, must look like to be loaded."""

import math
from collections.abc import Mapping
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

SIZES = listed(whole, 2)

IMPORTANCES = optional(mapped(listed(finite_tensor, 2)))
"""Importance of outputs and inputs of each layer."""


TRACE = optional(
    entries(
        {
            "positions": mapped(listed(whole)),
            "spectra": mapped(listed(number)),
            "sensitivities": optional(
                entries({"edges": listed(number), "kept": listed(whole), "dropped": listed(whole)})
            ),
            "walk": optional(
                entries(
                    {
                        "removals": whole,
                        "stride": whole,
                        "lowest": listed(number),
                        "highest": listed(number),
                        "total": number,
                        "length": number,
                    }
                )
            ),
            "states": listed(
                entries(
                    {
                        "kind": text,
                        "loss": optional(number),
                        "taken_back": yes_or_no,
                        "first_order": optional(number),
                        "second_order": optional(number),
                    }
                )
            ),
        }
    )
)
"""`Trace.to_dict`."""


def _rows_or_metric(value: Any, key: str) -> None:
    """Check an entry of a task in `Report.accuracy`: its number of rows, or a metric by model."""
    if isinstance(value, Mapping):
        mapped(number)(value, key)
    else:
        whole(value, key)


_REPORT = entries(
    {
        "prune_ratio": entries(
            {"asked": finite, "reached": finite, "of": text, "counted_over": text}, ("of", "counted_over")
        ),
        "parameters": entries({"before": whole, "after": whole, "model": entries({"before": whole})}),
        "ranks": mapped(
            entries(
                {
                    "rank": optional(whole),
                    "shape": SIZES,
                    "kept": whole,
                    "in_8_bits": yes_or_no,
                    "highest": optional(whole),
                    "flops": optional(whole),
                },
                ("in_8_bits", "highest", "flops"),
            )
        ),
        "first_order_sum": number,
        "predicted_drift": number,
        "losses": listed(number),
        "correction_fractions": listed(number),
        "seconds": mapped(number),
        "coverage": optional(
            entries(
                {
                    "layers": whole,
                    "parameters": whole,
                    "model_parameters": whole,
                    "left_alone": listed(entries({"what": text, "tensors": whole, "parameters": whole})),
                }
            )
        ),
        "kept_back": optional(mapped(number)),
        "held_out": optional(mapped(number)),
        "perplexity": optional(mapped(number)),
        "perplexity_second": optional(mapped(number)),
        "perplexity_third": optional(mapped(number)),
        "word_perplexity": optional(mapped(mapped(number))),
        "accuracy": optional(mapped(mapped(_rows_or_metric))),
        "file_bytes": optional(mapped(number)),
        "peak_rss_bytes": whole,
        "left_dense": mapped(text),
        "rank_multiple": whole,
        "removed_experts": listed(text),
        "freed_beside": whole,
        "trace": TRACE,
        "continuations": optional(mapped(text)),
        "tokens_per_second": optional(mapped(number)),
        "seed": optional(whole),
        "config": mapped(anything),
    },
    (
        "first_order_sum",
        "predicted_drift",
        "coverage",
        "kept_back",
        "held_out",
        "perplexity",
        "perplexity_second",
        "perplexity_third",
        "word_perplexity",
        "accuracy",
        "file_bytes",
        "left_dense",
        "rank_multiple",
        "removed_experts",
        "freed_beside",
        "trace",
        "continuations",
        "tokens_per_second",
    ),
)


def REPORT(value: Any, key: str) -> None:  # noqa: N802  a check like the others here
    """Check `Report.to_dict`. Earlier releases called `first_order_sum` `predicted_drift`.

    Raises:
        FaultError: an entry is missing or of another form.
    """
    _REPORT(value, key)
    if "first_order_sum" not in value and "predicted_drift" not in value:
        raise FaultError(f"{key}.first_order_sum is missing".removeprefix("."))


_MEASURED = (
    "first_order_sum",
    "predicted_drift",
    "losses",
    "correction_fractions",
    "seconds",
    "kept_back",
    "held_out",
    "perplexity",
    "perplexity_second",
    "perplexity_third",
    "word_perplexity",
    "accuracy",
)
"""Entries of a report that can hold numbers that are not finite."""


def with_nan(report: Any) -> Any:
    """Return a report that was read from JSON, with NaN where null stands for a number that is not finite."""
    if not isinstance(report, Mapping):
        return report
    return {**report, **{key: _with_nan(report[key]) for key in _MEASURED if key in report}}


def _with_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _with_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_nan(item) for item in value]
    return math.nan if value is None else value


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


SELECTION = optional(
    entries({"kept": mapped(optional(listed(whole))), "drifts": mapped(number), "eight_bit": listed(text)})
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
    ("truncation_loss", "trace", "safeguard", "left_dense", "importances", "widths"),
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
