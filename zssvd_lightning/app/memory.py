"""Memory and time that a compression would take, from the config of a model alone: `zssvd plan --memory`."""

import sys
import time
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from zssvd_lightning._validation import require
from zssvd_lightning.app.run_config import CalibrationConfig, RunConfig
from zssvd_lightning.app.settings import is_yaml, with_options
from zssvd_lightning.compression.memory.extent import Extent, extent_of
from zssvd_lightning.compression.memory.limits import ways
from zssvd_lightning.compression.memory.needs import Formulas, Needs
from zssvd_lightning.compression.memory.work import Work, work_of
from zssvd_lightning.config.compression import CompressionConfig
from zssvd_lightning.config.loading import load_config
from zssvd_lightning.errors import ModelSourceError
from zssvd_lightning.model.apart.kinds import KINDS
from zssvd_lightning.model.apart.taken import TakenApart
from zssvd_lightning.model.replace import replace_module
from zssvd_lightning.model.targets import Target, find_targets, is_selected
from zssvd_lightning.sources.models import load_model_config

SIDE = 1024
"""Side of the matrices by which a rate is measured."""

SHOWN = ("best", "zs-svd")
"""Presets that are shown if none is given."""


class Row(NamedTuple):
    """Needs of one compression."""

    preset: str
    """Name of a preset, or of the settings given."""
    memory: str
    """Setting `memory`."""
    offload: str
    """Setting `offload`; `none` for `blocks`, which are in scratch files in any case."""
    corrections: int
    """Number of corrections."""
    needs: Needs
    work: Work


def memory_needs(source: str, overrides: Sequence[str], options: dict[str, Any]) -> list[Row]:
    """Return what a compression of a model needs, by every `memory` and `offload` that its settings leave open.

    Args:
        source: YAML file or model source; its config alone is read.
        overrides: `key=value` overrides.
        options: values of options by dotted key; without `preset` and a file, those of `SHOWN` are compared.

    Raises:
        ConfigError: a setting is invalid.
        ModelSourceError: the config cannot be read, or no model can be made of it.
        TargetError: no layer can be compressed.
        BudgetError: the prune ratio is impossible.
    """
    given = options.get("preset")
    presets = [given] if given is not None or is_yaml(source) else list(SHOWN)
    rows: list[Row] = []
    extent: Extent | None = None
    for preset in presets:
        run = _settings(source, overrides, {**options, "preset": preset})
        config = run.compression
        if extent is None:
            saved = load_model_config(run.model.source)
            mapped_type = type_mapped(run.model.source, saved)
            model = empty_model(saved, run.model.dtype)
            mapped = [name for name, parameter in model.named_parameters() if parameter.dtype == mapped_type]
            take_modules_apart(model, config)
            targets = find_targets(model, config.include, config.ignore, config.opted)
            extent = extent_of_calibration(model, targets, run.calibration, mapped)
        rows += [_row(preset or "as given", way, extent, run.calibration.batches) for way in ways(config)]
    return rows


def table_of(rows: Sequence[Row], rate: float, source: str) -> Table:
    """Return a table of needs in GB (10^9 bytes), and of the work.

    Args:
        rows: the needs.
        rate: floating-point operations per second.
        source: words on where the rate comes from.
    """
    table = Table(
        caption="GB. With a GPU: device and host. Without: all in one memory. A training afterward takes more. Hours: "
        f"all TFLOP at {rate / 1e12:.3g} TFLOP/s ({source}). SVDs run more slowly than products of matrices, so the "
        "hours are a lower bound."
    )
    for column in ("preset", "corrections", "memory", "offload"):
        table.add_column(column)
    sizes = ("device", "host", "without a GPU", "scratch files", "for resuming")
    for column in (*sizes, "TFLOP: passes", "decompositions", "hours"):
        table.add_column(column, justify="right")
    for row in rows:
        numbers = [*(f"{size / 1e9:.2f}" for size in row.needs), *(f"{size / 1e12:.4g}" for size in row.work)]
        hours = f"{row.work.hours(rate):.3g}"
        table.add_row(row.preset, str(row.corrections), row.memory, row.offload, *numbers, hours)
    return table


def rate_of(flops: float | None, device: str | None) -> tuple[float, str]:
    """Return a rate in floating-point operations per second, and words on where it comes from.

    Args:
        flops: the rate, if it is known.
        device: device on which it is measured otherwise; the GPU if there is one, else the CPU, when None.

    Raises:
        ConfigError: the rate is not above 0.
    """
    if flops is not None:
        require(flops > 0, "flops", flops, "above 0")
        return flops, "as given"
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    A, seconds = torch.ones(SIDE, SIDE, device=place), []
    for _ in range(4):
        start = time.perf_counter()
        float((A @ A)[0, 0])  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return 2 * SIDE**3 / min(seconds), f"measured: products of float32 matrices ({SIDE}, {SIDE}) on {place}"


def empty_model(config: PreTrainedConfig, dtype: str) -> PreTrainedModel:
    """Return a causal language model on the meta device, without memory for its weights.

    Raises:
        ModelSourceError: transformers makes no causal language model of the config.
    """
    try:
        made: Any = AutoModelForCausalLM
        with torch.device("meta"):
            model: PreTrainedModel = made.from_config(config, dtype=getattr(torch, dtype))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelSourceError(f"no causal language model can be made of this config: {error}") from error
    return model


def take_modules_apart(model: PreTrainedModel, config: CompressionConfig) -> None:
    """Put linear layers in place of stacked experts and attentions of an empty model, as a compression does."""

    def selected(name: str) -> bool:
        return is_selected(name, config.include, config.ignore)

    for kind in (kind for kind in KINDS if kind.opt_in is None):
        TakenApart(kind, model, selected, replace_module).put_in(proves=False)


def type_mapped(source: str, config: PreTrainedConfig) -> torch.dtype | None:
    """Return the type of weights in which a model source is mapped from its files: that in which it was saved.

    It is None for packages and for systems other than Linux. Parameters that a file has in parts, such as stacked
    experts, are not mapped either.
    """
    saved = getattr(config, "dtype", None) or torch.float32
    maps = sys.platform.startswith("linux") and not source.startswith("package:")
    return getattr(torch, str(saved).removeprefix("torch.")) if maps else None


def extent_of_calibration(
    model: PreTrainedModel, targets: dict[str, Target], calibration: CalibrationConfig, mapped: Collection[str] = ()
) -> Extent:
    """Return the sizes from which needs follow, by one pass of a batch over the empty model; see `extent_of`.

    Args:
        model: the model.
        targets: its target layers.
        calibration: number and size of the batches.
        mapped: names of the parameters that will be mapped from files.
    """

    def forward(fake: nn.Module) -> Any:
        ids = torch.zeros(calibration.batch_size, calibration.length, dtype=torch.long, device="meta")
        return fake(input_ids=ids, labels=ids, use_cache=False)

    return extent_of(model, targets, calibration.batches, forward, mapped)


def _row(preset: str, config: CompressionConfig, extent: Extent, batches: int) -> Row:
    others = extent.weights // extent.width - sum(m * n for m, n in extent.shapes.values())
    formulas = Formulas(extent, config, config.budget_over(extent.shapes, {}, others))
    place = "none" if config.by_blocks else config.place
    return Row(preset, config.memory, place, config.corrections, formulas.needs(), work_of(formulas, batches))


def _settings(source: str, overrides: Sequence[str], options: dict[str, Any]) -> RunConfig:
    path = source if is_yaml(source) else None
    entries = with_options(overrides, options if path else {"model.source": source, **options})
    return load_config(RunConfig, path, entries, {"output": ".", "calibration": {"text": "-"}})
