"""Required form of a report that is loaded from a checkpoint or from `report.json`."""

import math
from collections.abc import Mapping
from typing import Any

from zssvd_lightning._state_checks import (
    FaultError,
    anything,
    entries,
    finite,
    listed,
    mapped,
    number,
    optional,
    text,
    whole,
    yes_or_no,
)

SIZES = listed(whole, 2)


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
                    "units": optional(listed(whole, 2)),
                },
                ("in_8_bits", "highest", "flops", "units"),
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
