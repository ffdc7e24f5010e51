"""PEFT adapters on the thin layers of compressed layers: attach, record in saved weights, merge and save.

The thin layers are the two factors of a low-rank layer, or the pivots and coefficients of a pivoted one. Merging
changes the shape of neither, so the layer keeps its form and rank.

An adapter on `layer.up` renames `layer.up.weight` in the checkpoint to `layer.up.base_layer.weight` and adds the
adapter's weights next to it. The name of one more entry, the note, describes the adapter, so that the layers can be
rebuilt from the weights alone.
"""

import copy
import json
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from zssvd_lightning._validation import closest, needs_extra
from zssvd_lightning.errors import ConfigError, RecoveryError
from zssvd_lightning.layers.base import ADAPTER_NOTE, HOOKS, carry_hooks, type_of
from zssvd_lightning.layers.registry import Factored
from zssvd_lightning.model.replace import factored_layers, replace_module

NAME = "default"
"""Name of the adapter in peft."""


PARTS = ("down", "up")
"""Names of the two factors, in the order in which they are applied."""


FOLDER = "adapter"
"""Folder of the adapter, next to the weights of a saved model."""

RANK_OPTIONS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules")
"""Options of an adapter that PEFT's files give for each layer."""


@dataclass(frozen=True)
class Adapter:
    """Description of a peft adapter for the thin layers of a layer.

    Args:
        kind: a `peft.PeftType`, such as `LORA`.
        options: options of that kind's config class, as plain types.
        seed: seed of the initial values. Apart from it, they depend only on the name of the layer.

    Raises:
        ConfigError: an option is unknown, peft refuses its value, or the value is not of a plain type.
    """

    kind: str
    options: Mapping[str, Any]
    seed: int = 0

    def __post_init__(self) -> None:
        _ = self.config
        try:
            _ = self.note
        except TypeError as error:
            raise ConfigError(
                f"{self.kind}: {dict(self.options)} has values that are no plain types: {error}"
            ) from error

    @cached_property
    def config(self) -> Any:
        """`PeftConfig` of the adapter.

        Raises:
            ConfigError: PEFT does not know an option, or refuses its value.
        """
        with needs_extra("peft", "adapters"):
            from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        schema = PEFT_TYPE_TO_CONFIG_MAPPING[self.kind]  # type: ignore[index]
        known = schema.__dataclass_fields__
        if unknown := [key for key in self.options if key not in known]:
            raise ConfigError(f"{schema.__name__} has no option {unknown[0]!r}{closest(unknown[0], known)}")
        try:
            return schema(**self.options)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{schema.__name__} refuses {dict(self.options)}: {error}") from error

    @cached_property
    def note(self) -> str:
        """Entry name that describes the adapter in saved weights."""
        told = {"kind": self.kind, "options": dict(self.options), "seed": self.seed}
        return ADAPTER_NOTE + json.dumps(told, sort_keys=True)

    @classmethod
    def of(cls, note: str) -> "Adapter":
        """Create the adapter that a note describes."""
        return cls(**json.loads(note.removeprefix(ADAPTER_NOTE)))

    def parts_of(self, name: str, layer: Factored) -> list[str]:
        """Return the thin layers of `layer`, which is called `name` in its model, that the adapter applies to."""
        from peft.tuners.tuners_utils import check_target_module_exists

        return [part for part in layer.thin_layers() if check_target_module_exists(self.config, f"{name}.{part}")]

    def attach(self, name: str, layer: Factored, *, empty: bool = False) -> None:
        """Attach the adapter to the thin layers of a layer, in place. Only the added weights require gradients.

        Args:
            name: name of the layer in its model, which peft's patterns match.
            layer: unsharded layer without an adapter.
            empty: True to leave the adapter's weights on the meta device, for a load.

        Raises:
            RecoveryError: peft cannot attach the adapter.
        """
        from peft import inject_adapter_in_model

        holder = _holding(name, layer)
        weights = next(iter(layer.thin_layers().values())).weight
        flags = bool(weights.requires_grad), layer.bias is not None and layer.bias.requires_grad
        try:
            with torch.random.fork_rng():
                torch.manual_seed(self.seed + zlib.crc32(name.encode()))
                inject_adapter_in_model(self.config, holder, NAME, low_cpu_mem_usage=empty)
        except (ValueError, TypeError, AttributeError) as error:
            raise RecoveryError(f"peft cannot put {self.kind} on {name}: {error}") from error
        nn.Module.to(layer, type_of(layer))
        layer.adapter, layer.flags = self.note, flags


def on(model: nn.Module) -> dict[str, Factored]:
    """Return the layers of a model that have an adapter, by name."""
    return {name: layer for name, layer in factored_layers(model) if layer.adapter is not None}


def told_in(weights: Mapping[str, Any]) -> dict[str, Adapter]:
    """Return the adapters that saved weights describe, by layer name."""
    found = (key.partition(f".{ADAPTER_NOTE}") for key in weights if ADAPTER_NOTE in key)
    return {name: Adapter.of(told) for name, _, told in found}


@torch.no_grad()
def merged(layer: Factored, whole: Callable[[Tensor], Tensor]) -> Factored:
    """Return a plain layer with the adapter of `layer` merged into it. Form, rank and hooks are the same.

    Args:
        layer: layer with an adapter.
        whole: function that returns the full parameter for this process's part of it.

    Raises:
        RecoveryError: peft cannot merge the adapter.
    """
    memo: dict[int, Any] = {id(layer.__dict__[kind]): OrderedDict() for kind in HOOKS if layer.__dict__[kind]}
    memo |= {id(p): nn.Parameter(whole(p).clone(), requires_grad=False) for p in layer.parameters()}
    new = copy.deepcopy(layer, memo)
    for name, part in _wrapped(new).items():
        try:
            part.merge()
        except (RuntimeError, ValueError, NotImplementedError) as error:
            raise RecoveryError(f"peft cannot merge {layer.adapter}: {error}") from error
        setattr(new, name, part.get_base_layer())
    new.adapter = None
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(layer.flags[name.endswith("bias")])
    carry_hooks(new, layer)
    return new


def merge_adapters(
    model: nn.Module,
    replace: Callable[[nn.Module, nn.Module, nn.Module], None] = replace_module,
    whole: Callable[[Tensor], Tensor] = Tensor.detach,
) -> None:
    """Merge every adapter into its layer, in place. Forms, ranks and outputs do not change.

    Args:
        model: model with or without adapters on its compressed layers.
        replace: function that replaces one layer by another, called as `replace(model, old, new)`.
        whole: see `merged`.

    Raises:
        RecoveryError: peft cannot merge an adapter.
    """
    for layer in on(model).values():
        replace(model, layer, merged(layer, whole))


@contextmanager
def taken_off(model: nn.Module) -> Iterator[None]:
    """Detach all adapters within the context, which restores the parameter names of the plain model."""
    before = [(layer, layer.adapter, _wrapped(layer)) for layer in on(model).values()]
    for layer, _, parts in before:
        layer.adapter = None
        for name, part in parts.items():
            setattr(layer, name, part.get_base_layer())
    try:
        yield
    finally:
        for layer, adapter, parts in before:
            layer.adapter = adapter
            for name, part in parts.items():
                setattr(layer, name, part)


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Write the adapter of a model in peft's format, for `PeftModel.from_pretrained(compressed_model, folder)`.

    The compressed model must be the one that `save_pretrained` writes for this model, since some initializations
    (PiSSA, OLoRA) subtract a part from the factors.

    Args:
        model: model with an adapter on its compressed layers, unsharded.
        folder: output folder, created if missing.

    Raises:
        RecoveryError: the model has no adapter, or adapters that one folder cannot describe.
    """
    layers = on(model)
    if not layers:
        raise RecoveryError(
            f"{type(model).__name__} has no adapter on its compressed layers; train one with LoRARecovery(merge=False) "
            "or SingularValueRecovery(merge=False)"
        )
    by_layer = {name: Adapter.of(layer.adapter or "") for name, layer in layers.items()}
    adapter = next(iter(by_layer.values()))
    if other := [name for name, each in by_layer.items() if _apart_from_ranks(each) != _apart_from_ranks(adapter)]:
        raise RecoveryError(
            f"the adapter of {other[0]} differs from that of {next(iter(by_layer))} in more than its rank, but PEFT "
            "has one set of options for all layers; merge_adapters(model) first"
        )
    parts = {f"{name}.{part}": wrapped for name, layer in layers.items() for part, wrapped in _wrapped(layer).items()}
    kept = {"target_modules": list(parts), "inference_mode": True}
    if adapter.kind == "LORA":
        kept["init_lora_weights"] = True  # other initializations would change the factors again on loading
        kept["rank_pattern"] = {name: part.r[NAME] for name, part in parts.items()}
        kept["alpha_pattern"] = {name: part.lora_alpha[NAME] for name, part in parts.items()}
    folder.mkdir(parents=True, exist_ok=True)
    Adapter(adapter.kind, dict(adapter.options) | kept).config.save_pretrained(str(folder))
    weights = {
        f"base_model.model.{name}.{_in_peft(key)}": value.detach().cpu().contiguous()
        for name, layer in layers.items()
        for key, value in layer.state_dict().items()
        if f".{NAME}" in key
    }
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _wrapped(layer: Factored) -> dict[str, Any]:
    """Return the thin layers that peft has wrapped, by name."""
    return {name: part for name, part in layer.thin_layers().items() if not isinstance(part, nn.Linear)}


def _apart_from_ranks(adapter: Adapter) -> tuple[str, dict[str, Any]]:
    return adapter.kind, {key: value for key, value in adapter.options.items() if key not in RANK_OPTIONS}


def _in_peft(key: str) -> str:
    """Return the name of an adapter weight in peft's files."""
    return key.replace(f".{NAME}", "").replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def _holding(name: str, layer: nn.Module) -> nn.Module:
    """Return a module in which `layer` has the same qualified name as in its model."""
    *parents, last = name.split(".")
    root = at = nn.Module()
    for parent in parents:
        inner = nn.Module()
        at.add_module(parent, inner)
        at = inner
    at.add_module(last, layer)
    return root
