"""Matching the compressed layers of a model to saved weights.

The names of saved weights identify the form of each layer: a dense layer has `layer.weight`, a low-rank layer has
`layer.up.weight` and `layer.down.weight`, and every other form has distinct names.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from zssvd_lightning.errors import CheckpointError
from zssvd_lightning.layers.apart.experts import expert_lists
from zssvd_lightning.layers.apart.removed import RemovedLinear, forget_removed, router_beside
from zssvd_lightning.layers.base import ADAPTER_NOTE, LOADING_NOTE, NOTE, CompressedLinear, Dense, own_memory, shape_of
from zssvd_lightning.layers.registry import KINDS, Factored, dense_like, layer_like
from zssvd_lightning.model import adapters
from zssvd_lightning.model.adapters import Adapter
from zssvd_lightning.model.apart.kinds import KINDS as APART
from zssvd_lightning.model.apart.taken import match_parts
from zssvd_lightning.model.replace import inside_compressed, replace_module
from zssvd_lightning.selection.storages import STORAGES
from zssvd_lightning.serialization.specs import specs_of

NAMED = 3
"""Maximum number of parameter names that an error message lists for each problem."""


def match_structure(
    model: nn.Module,
    weights: Mapping[str, Any],
    *,
    strict: bool = True,
    replace: Callable[[nn.Module, nn.Module, nn.Module], None] = replace_module,
) -> None:
    """Replace layers of `model` in place, so that their form and rank match `weights`.

    Dense layers may become compressed, and compressed layers may change form or rank or become dense. Stacked experts,
    attentions and recurrent modules may become separate layers, convolutions unfolded ones, and the other way round.
    New layers have no values yet. Nothing is changed if the weights would not load afterward.

    Args:
        model: the module that will load the weights.
        weights: the state dict to load; its names are those of `model.state_dict()`, before or after the replacement.
        strict: whether missing and unexpected names are errors, as in `load_state_dict`.
        replace: function that puts a layer in place of another, called as `replace(model, old, new)`.

    Raises:
        CheckpointError: the weights belong to another model; the message lists names and shapes that do not fit.
    """
    STORAGES.loaded()  # their layers are looked for too
    undo = [match_parts(kind, model, weights, replace) for kind in APART]
    try:
        _refuse_no_router(model, weights)
        _match_layers(model, weights, strict, replace)
    except BaseException:
        for restore in undo:
            restore()
        raise
    forget_removed(model)
    for kind in APART:
        for part in model.modules() if kind.separates else ():
            if isinstance(part, kind.form):
                own_memory(part)


def _refuse_no_router(model: nn.Module, weights: Mapping[str, Any]) -> None:
    """Raise CheckpointError if weights lack experts that no router of `model` could be kept from choosing."""
    for name, experts in expert_lists(model):
        layers = [key for key, part in experts.named_modules(prefix=name) if isinstance(part, Dense | CompressedLinear)]
        removed = any(RemovedLinear.found_in(weights, layer) is not None for layer in layers)
        if removed and router_beside(model, name, len(experts.experts)) is None:
            raise CheckpointError(
                f"experts of {name} are removed in the weights, but no router beside it has a row for each expert; "
                "load them into the model they were saved from"
            )


def _match_layers(
    model: nn.Module,
    weights: Mapping[str, Any],
    strict: bool,
    replace: Callable[[nn.Module, nn.Module, nn.Module], None],
) -> None:
    """Replace layers as `match_structure` does, once experts are as in the weights."""
    replaced: dict[str, Dense | CompressedLinear] = {}
    successors: dict[int, Dense | CompressedLinear] = {}
    told = adapters.told_in(weights)
    for name, layer in _layers(model):
        if id(layer) not in successors and (successor := _successor(name, layer, weights, told)) is not None:
            successors[id(layer)] = successor
        if id(layer) in successors:
            replaced[name] = successors[id(layer)]
    _refuse_foreign(model, replaced, weights, strict)
    olds = dict(_layers(model))
    for name, new in replaced.items():
        device = next(_tensors(olds[name])).device
        replace(model, olds[name], new.to_empty(device=device) if next(_tensors(new)).is_meta else new)


def note(model: nn.Module) -> dict[str, Tensor]:
    """Return extra state dict entries that a plain load reports as unexpected; empty for a dense model.

    The loading note is the last entry, so that it ends a long list of unexpected names. It is placed under a
    compressed layer, which drops it on loading. Each layer with an adapter also gets an entry that describes how to
    build the adapter.
    """
    told = {f"{name}.{layer.adapter}": torch.empty(0) for name, layer in adapters.on(model).items()}
    return told | {f"{name}.{LOADING_NOTE}": torch.empty(0) for name in list(specs_of(model))[-1:]}


def _layers(model: nn.Module) -> Iterator[tuple[str, Dense | CompressedLinear]]:
    """Yield layers that are or can be compressed, under every name they have; skip modules inside compressed ones."""
    parts = inside_compressed(model)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (nn.Linear, Conv1D, CompressedLinear)) and id(module) not in parts:
            yield name, module


def _successor(
    name: str, layer: Dense | CompressedLinear, weights: Mapping[str, Any], told: Mapping[str, Adapter]
) -> Dense | CompressedLinear | None:
    """Return a layer without values that fits these weights; None if `layer` fits or the weights lack this layer."""
    if f"{name}.weight" in weights:
        return dense_like(layer) if isinstance(layer, CompressedLinear) else None
    for kind, form in KINDS.items():
        if (sizes := form.found_in(weights, name)) is None:
            continue
        spec = {"kind": kind} | sizes
        new, adapter = layer_like(layer, spec), told.get(name)
        if adapter is not None and isinstance(new, Factored):
            adapter.attach(name, new, empty=True)
        for part, value in new.state_dict().items():
            found = weights.get(f"{name}.{part}")
            if found is not None and found.shape != value.shape:
                raise CheckpointError(
                    f"{name} is {shape_of(layer)} in the model, so that its {part} is {tuple(value.shape)}, but it is "
                    f"{tuple(found.shape)} in the checkpoint; load it into the model it was saved from"
                )
        return None if isinstance(layer, CompressedLinear) and _form(layer) == _form(new) else new
    return None


def _form(layer: CompressedLinear) -> tuple[Any, ...]:
    return layer.spec, layer.adapter if isinstance(layer, Factored) else None


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())


def _refuse_foreign(
    model: nn.Module, replaced: Mapping[str, nn.Module], weights: Mapping[str, Any], strict: bool
) -> None:
    """Raise CheckpointError if `model`, after the replacements, would not load the weights."""
    left_to_themselves = [
        f"{name}." for name, module in model.named_modules() if name and _loads_in_its_own_way(module)
    ]
    expected = {
        name: tuple(value.shape)
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor) and not name.startswith(tuple(f"{place}." for place in replaced))
    }
    for place, module in replaced.items():
        expected |= {f"{place}.{name}": tuple(value.shape) for name, value in module.state_dict().items()}
    found = {
        name: tuple(value.shape)
        for name, value in weights.items()
        if isinstance(value, Tensor) and f".{NOTE}" not in name and ADAPTER_NOTE not in name
    }
    checked = {name for name in expected.keys() | found.keys() if not name.startswith(tuple(left_to_themselves))}
    complaints = []
    if strict:
        complaints += _complaint("missing", sorted(checked & (expected.keys() - found.keys())))
        complaints += _complaint("unexpected", sorted(checked & (found.keys() - expected.keys())))
    both = sorted(checked & expected.keys() & found.keys())
    complaints += _complaint(
        "of another shape", [f"{n} {found[n]} instead of {expected[n]}" for n in both if found[n] != expected[n]]
    )
    if complaints:
        raise CheckpointError(
            f"the weights do not belong to this {type(model).__name__}: {'; '.join(complaints)}. Load them into the "
            "module they were saved from, built with the same arguments"
        )


def _complaint(kind: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    return [f"{len(names)} {kind} ({', '.join(names[:NAMED])}{', ...' if len(names) > NAMED else ''})"] if names else []


def _loads_in_its_own_way(module: nn.Module) -> bool:
    """Return True if a module may rename or convert weights on loading, so that they cannot be checked here."""
    if isinstance(module, CompressedLinear):
        return False
    overridden = type(module)._load_from_state_dict is not nn.Module._load_from_state_dict  # noqa: SLF001
    return overridden or bool(module._load_state_dict_pre_hooks)  # noqa: SLF001
