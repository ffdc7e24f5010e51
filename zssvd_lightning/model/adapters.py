"""Adapters of peft on the factors of low-rank layers: put on, told of in saved weights, merged, and saved.

An adapter on `layer.up` makes `layer.up.weight` of the checkpoint `layer.up.base_layer.weight`, with its own weights
beside it. What it is stands in the name of one more entry, so that weights alone tell how to build what they are of.
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

from zssvd_lightning._validation import closest
from zssvd_lightning.errors import ConfigError, RecoveryError
from zssvd_lightning.layers.base import ADAPTER_NOTE, HOOKS, carry_hooks, type_of
from zssvd_lightning.layers.low_rank import LowRankLinear
from zssvd_lightning.model.replace import replace_module

NAME = "default"
"""What peft calls the adapter."""


PARTS = ("down", "up")
"""The factors of a low-rank layer."""


FOLDER = "adapter"
"""Folder, beside the weights of a saved model, of the adapter on it."""


@dataclass(frozen=True)
class Adapter:
    """What peft is told to put on factors.

    Args:
        kind: a `peft.PeftType`, such as `LORA`.
        options: of the config class of that kind; plain types.
        seed: of the initial values, which also depend on the layer's name alone.

    Raises:
        ConfigError: an option is unknown, or peft refuses its value.
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
        """The `PeftConfig` of it."""
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
        """It as a name of an entry in saved weights."""
        told = {"kind": self.kind, "options": dict(self.options), "seed": self.seed}
        return ADAPTER_NOTE + json.dumps(told, sort_keys=True)

    @classmethod
    def of(cls, note: str) -> "Adapter":
        """The one that a note tells of."""
        return cls(**json.loads(note.removeprefix(ADAPTER_NOTE)))

    def parts_of(self, name: str) -> list[str]:
        """The factors of the layer `name` that it goes on."""
        from peft.tuners.tuners_utils import check_target_module_exists

        return [part for part in PARTS if check_target_module_exists(self.config, f"{name}.{part}")]

    def attach(self, name: str, layer: LowRankLinear, *, empty: bool = False) -> None:
        """Puts it on the factors of a layer, in place; only what it adds requires gradients.

        Args:
            name: of the layer in its model, by which peft's patterns go.
            layer: whole, without an adapter.
            empty: whether to leave its weights without values, on the meta device, for a load.

        Raises:
            RecoveryError: peft cannot put it there.
        """
        from peft import inject_adapter_in_model

        holder = _holding(name, layer)
        flags = layer.up.weight.requires_grad, layer.up.bias is not None and layer.up.bias.requires_grad
        try:
            with torch.random.fork_rng():
                torch.manual_seed(self.seed + zlib.crc32(name.encode()))
                inject_adapter_in_model(self.config, holder, NAME, low_cpu_mem_usage=empty)
        except (ValueError, TypeError, AttributeError) as error:
            raise RecoveryError(f"peft cannot put {self.kind} on {name}: {error}") from error
        nn.Module.to(layer, type_of(layer))
        layer.adapter, layer.flags = self.note, flags


def on(model: nn.Module) -> dict[str, LowRankLinear]:
    """The layers of a model with an adapter on them, by name."""
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, LowRankLinear))
    return {name: layer for name, layer in layers if layer.adapter is not None}


def told_in(weights: Mapping[str, Any]) -> dict[str, Adapter]:
    """The adapters that saved weights tell of, by the name of their layer."""
    found = (key.partition(f".{ADAPTER_NOTE}") for key in weights if ADAPTER_NOTE in key)
    return {name: Adapter.of(told) for name, _, told in found}


@torch.no_grad()
def merged(layer: LowRankLinear, whole: Callable[[Tensor], Tensor]) -> LowRankLinear:
    """A plain layer that computes what `layer` and its adapter do, of the same rank, with the same hooks.

    Args:
        layer: with an adapter.
        whole: makes of a parameter of it, as this process holds it, the whole one.

    Raises:
        RecoveryError: peft cannot merge it.
    """
    memo: dict[int, Any] = {id(layer.__dict__[kind]): OrderedDict() for kind in HOOKS if layer.__dict__[kind]}
    memo |= {id(p): nn.Parameter(whole(p).clone(), requires_grad=False) for p in layer.parameters()}
    new = copy.deepcopy(layer, memo)
    for part in PARTS:
        factor: Any = getattr(new, part)
        if not isinstance(factor, nn.Linear):
            try:
                factor.merge()
            except (RuntimeError, ValueError, NotImplementedError) as error:
                raise RecoveryError(f"peft cannot merge {layer.adapter}: {error}") from error
            setattr(new, part, factor.get_base_layer())
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
    """Merges every adapter into the factors it is on, in place; ranks and all that is computed stay the same.

    Args:
        model: with adapters on its low-rank layers, or without.
        replace: puts a layer in the place of another, `replace(model, old, new)`.
        whole: see `merged`.
    """
    for layer in on(model).values():
        replace(model, layer, merged(layer, whole))


@contextmanager
def taken_off(model: nn.Module) -> Iterator[None]:
    """Within the context the model is as if its adapters had never been put on it, with the names of a plain one."""
    before = [(layer, layer.adapter, dict(layer._modules)) for layer in on(model).values()]  # noqa: SLF001
    for layer, _, parts in before:
        layer.adapter = None
        for part, factor in parts.items():
            setattr(layer, part, factor if isinstance(factor, nn.Linear) else factor.get_base_layer())  # type: ignore[union-attr, operator]
    try:
        yield
    finally:
        for layer, adapter, parts in before:
            layer.adapter = adapter
            for part, factor in parts.items():
                setattr(layer, part, factor)


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Writes the adapter on a model the way peft does, for `PeftModel.from_pretrained(compressed_model, folder)`.

    The compressed model has to be the one that `save_pretrained` writes of this model: some ways to begin (PiSSA,
    OLoRA) take a part of the factors out of them.

    Args:
        model: with an adapter on its low-rank layers, each whole.
        folder: is created.

    Raises:
        RecoveryError: there is no adapter on the model, or there are several.
    """
    layers = on(model)
    if not layers:
        raise RecoveryError(
            f"{type(model).__name__} has no adapter on its low-rank layers; train one with LoRARecovery(merge=False) "
            "or SingularValueRecovery(merge=False)"
        )
    by_layer = {name: Adapter.of(layer.adapter or "") for name, layer in layers.items()}
    adapter = next(iter(by_layer.values()))
    parts = {f"{name}.{part}": getattr(layer, part) for name, layer in layers.items() for part in PARTS}
    factors = {name: factor for name, factor in parts.items() if not isinstance(factor, nn.Linear)}
    kept = {"target_modules": list(factors), "inference_mode": True}
    if adapter.kind == "LORA":
        kept["init_lora_weights"] = True  # other ways to begin would change the factors it is loaded on once more
        kept["rank_pattern"] = {name: factor.r[NAME] for name, factor in factors.items()}
        kept["alpha_pattern"] = {name: factor.lora_alpha[NAME] for name, factor in factors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    Adapter(adapter.kind, dict(adapter.options) | kept).config.save_pretrained(str(folder))
    weights = {
        f"base_model.model.{name}.{_in_peft(key)}": value.detach().cpu().contiguous()
        for name, layer in layers.items()
        for key, value in layer.state_dict().items()
        if f".{NAME}" in key
    }
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _in_peft(key: str) -> str:
    """What peft's files call a weight of an adapter."""
    return key.replace(f".{NAME}", "").replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def _holding(name: str, layer: nn.Module) -> nn.Module:
    """A module in which `layer` has the name it has in its model."""
    *parents, last = name.split(".")
    root = at = nn.Module()
    for parent in parents:
        inner = nn.Module()
        at.add_module(parent, inner)
        at = inner
    at.add_module(last, layer)
    return root
