"""Memory that a compression would take, from the config of a model alone: `zssvd plan --memory`."""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from zssvd_lightning.app.run_config import CalibrationConfig, RunConfig
from zssvd_lightning.app.settings import is_yaml, with_options
from zssvd_lightning.config.compression import CompressionConfig
from zssvd_lightning.config.loading import load_config
from zssvd_lightning.decomposition.needs import Extent, Formulas, Needs
from zssvd_lightning.errors import ContradictionError, ModelSourceError
from zssvd_lightning.model.targets import Target, find_targets
from zssvd_lightning.sources.models import load_model_config

logger = logging.getLogger(__name__)

SHOWN = ("best", "zs-svd")
"""Presets that are shown if none is given."""


class Row(NamedTuple):
    """Needs of one compression."""

    preset: str
    """Name of a preset, or of the settings given."""
    memory: str
    """Setting `memory`."""
    corrections: int
    """Number of corrections."""
    needs: Needs


def memory_needs(source: str, overrides: Sequence[str], options: dict[str, Any]) -> list[Row]:
    """Return what a compression of a model needs, the whole way and block by block.

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
            model = empty_model(load_model_config(run.model.source), run.model.dtype)
            targets = find_targets(model, config.include, config.ignore)
            extent = extent_of(model, targets, run.calibration)
        for way in ("whole", "blocks"):
            try:
                asked = replace(config, memory=way)
            except ContradictionError:  # refits, and offload, are not for blocks
                continue
            rows.append(_row(preset or "as given", asked, extent))
    return rows


def table_of(rows: Sequence[Row]) -> Table:
    """Return a table of needs in GB (10^9 bytes)."""
    table = Table(
        caption="GB. With a GPU: device and host. Without: all in one memory. A training afterward takes more."
    )
    for column in ("preset", "corrections", "memory"):
        table.add_column(column)
    for column in ("device", "host", "without a GPU", "scratch files"):
        table.add_column(column, justify="right")
    for row in rows:
        sizes = [f"{size / 1e9:.2f}" for size in row.needs]
        table.add_row(row.preset, str(row.corrections), row.memory, *sizes)
    return table


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


def extent_of(model: PreTrainedModel, targets: dict[str, Target], calibration: CalibrationConfig) -> Extent:
    """Return the sizes from which needs follow, by one pass of a batch over the empty model.

    Where the pass fails, which depends on the numbers in some models, activations are not counted, with a warning.
    """
    blocks = _blocks(model, list(targets))
    seen = _Seen(model, targets, list(blocks))
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), seen:
            ids = torch.zeros(calibration.batch_size, calibration.length, dtype=torch.long, device="meta")
            model(input_ids=ids, labels=ids, use_cache=False)
    except Exception as error:  # noqa: BLE001  models are of any kind
        logger.warning("activations are not counted, because the model does not run without weights: %s", error)
        seen.forget()
    within = [tuple(name for name in targets if name.startswith(f"{block}.")) for block in blocks]
    outside = tuple(set(targets) - {name for names in within for name in names})
    weights = {id(parameter): parameter.nbytes for parameter in model.parameters()}
    return Extent(
        shapes={name: target.shape for name, target in targets.items()},
        leaders={name: seen.leaders.get(name, name) for name in targets},
        blocks=(*within, outside),
        weights=sum(weights.values()),
        width=next(iter(targets.values())).module.weight.element_size(),
        stored=calibration.batches * seen.hidden,
        whole_pass=seen.kept,
        part_pass=max(seen.parts, default=0),
    )


class _Seen:
    """Context that records a pass over an empty model.

    Attributes:
        leaders: layer -> the first layer that read the same input.
        hidden: bytes of the first arguments of all blocks.
        kept: bytes that autograd keeps for the backward pass, without weights.
        parts: those of each block, and of what follows the last.
    """

    def __init__(self, model: nn.Module, targets: dict[str, Target], blocks: Sequence[str]) -> None:
        self.leaders: dict[str, str] = {}
        self.hidden, self.kept, self.parts = 0, 0, [0]
        self._model, self._targets, self._blocks = model, targets, blocks
        self._inputs: list[tuple[Tensor, str]] = []
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._stack = ExitStack()

    def __enter__(self) -> None:
        for name, target in self._targets.items():
            self._stack.callback(target.module.register_forward_pre_hook(partial(self._read, name)).remove)
        for name in self._blocks:
            block = self._model.get_submodule(name)
            self._stack.callback(block.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
            self._stack.callback(block.register_forward_hook(self._leave).remove)
        self._stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor))

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        self._inputs, self._storages = [], {}

    def forget(self) -> None:
        """Forget the pass."""
        self.leaders, self.hidden, self.kept, self.parts = {}, 0, 0, [0]

    def _read(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args:
            self.leaders[name] = next((leader for tensor, leader in self._inputs if tensor is args[0]), name)
            self._inputs.append((args[0], name))

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        self.hidden += 0 if hidden is None else hidden.nbytes
        self.parts.append(0)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.parts.append(0)

    def _keep(self, tensor: Tensor) -> Tensor:
        storage, root = tensor.untyped_storage(), tensor if tensor._base is None else tensor._base  # noqa: SLF001
        is_weight = root.is_leaf and root.requires_grad
        if not is_weight and storage._cdata not in self._storages:  # noqa: SLF001  without memory there is no address
            self._storages[storage._cdata] = storage  # noqa: SLF001
            self.kept += storage.nbytes()
            self.parts[-1] += storage.nbytes()
        return tensor


def _blocks(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Return the modules of the outermost lists that hold targets, which a sweep runs one after the other."""
    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1 and not any(name.startswith(f"{b}.") for b in found):
            items = [f"{name}.{key}" for key, _ in module.named_children()]
            found += items if any(target.startswith(f"{name}.") for target in names) else []
    return found


def _row(preset: str, config: CompressionConfig, extent: Extent) -> Row:
    width = extent.width
    others = extent.weights // width - sum(m * n for m, n in extent.shapes.values())
    formulas = Formulas(extent, config, config.budget_over(extent.shapes, {}, others))
    needs = formulas.blocks if config.by_blocks else formulas.whole
    return Row(preset, config.memory, config.corrections, needs)


def _settings(source: str, overrides: Sequence[str], options: dict[str, Any]) -> RunConfig:
    path = source if is_yaml(source) else None
    entries = with_options(overrides, options if path else {"model.source": source, **options})
    return load_config(RunConfig, path, entries, {"output": ".", "calibration": {"text": "-"}})
