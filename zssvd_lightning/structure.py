"""Which layers are low-rank, in a model and in saved weights, and making the first agree with the second.

Shapes: W (m, n), up (m, k), down (k, n). Saved weights say it all: where a model has `layer.weight`, a low-rank
layer has `layer.up.weight` and `layer.down.weight`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from zssvd_lightning.errors import CheckpointError, SavedModelError
from zssvd_lightning.modules import LOADING_NOTE, Dense, LowRankLinear, dense_like, low_rank_like, shape_of
from zssvd_lightning.targets import replace_module

NAMED = 3
"""How many parameters of a kind a message names."""


def ranks_of(model: nn.Module) -> dict[str, int]:
    """Rank of every `LowRankLinear` in `model`, by qualified name."""
    return {name: module.rank for name, module in model.named_modules() if isinstance(module, LowRankLinear)}


def rebuild(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Replaces the dense layers named in `ranks` by uninitialised low-rank ones, in place.

    Raises:
        SavedModelError: a name is not a linear layer of the model.
    """
    modules = dict(model.named_modules())
    for name, rank in ranks.items():
        old = modules.get(name)
        if not isinstance(old, (nn.Linear, Conv1D)):
            raise SavedModelError(f"the config gives {name} rank {rank}, but the model has no linear layer there")
        replace_module(model, old, low_rank_like(old, rank).to_empty(device=old.weight.device))


def match_structure(
    model: nn.Module,
    weights: Mapping[str, Any],
    *,
    strict: bool = True,
    replace: Callable[[nn.Module, nn.Module, nn.Module], None] = replace_module,
) -> None:
    """Makes layers of `model` low-rank, of another rank, or dense again, as `weights` have them, in place.

    New layers have no values yet. Nothing is changed when the weights would not load afterwards.

    Args:
        model: the module that is to load the weights.
        weights: its state dict, with the names `model.state_dict()` has or would have.
        strict: whether missing and unexpected names are errors, as in `load_state_dict`.
        replace: puts a layer in the place of another, `replace(model, old, new)`.

    Raises:
        CheckpointError: the weights belong to another model; says which names and shapes do not fit.
    """
    replaced: dict[str, Dense | LowRankLinear] = {}
    successors: dict[int, Dense | LowRankLinear] = {}
    for name, layer in _layers(model):
        if id(layer) not in successors and (successor := _successor(name, layer, weights)) is not None:
            successors[id(layer)] = successor
        if id(layer) in successors:
            replaced[name] = successors[id(layer)]
    _refuse_foreign(model, replaced, weights, strict)
    olds = dict(_layers(model))
    for name, new in replaced.items():
        device = next(olds[name].parameters()).device
        replace(model, olds[name], new.to_empty(device=device) if next(new.parameters()).is_meta else new)


def note(model: nn.Module) -> dict[str, Tensor]:
    """The entry that a plain load of this model's weights stumbles over and so reports; none for a dense model.

    It goes behind all others, where a long list of names ends, and under a low-rank layer, which knows to drop it.
    """
    low_rank = [(name, module) for name, module in model.named_modules() if isinstance(module, LowRankLinear)]
    return {f"{name}.{LOADING_NOTE}": torch.empty(0) for name, _ in low_rank[-1:]}


def _layers(model: nn.Module) -> Iterator[tuple[str, Dense | LowRankLinear]]:
    """Layers that are or can be low-rank, under every name they have; factors are part of theirs."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (nn.Linear, Conv1D, LowRankLinear)):
            parent = model.get_submodule(name.rpartition(".")[0]) if "." in name else model
            if not isinstance(parent, LowRankLinear):
                yield name, module


def _successor(name: str, layer: Dense | LowRankLinear, weights: Mapping[str, Any]) -> Dense | LowRankLinear | None:
    """The layer without values that can take these weights, where `layer` cannot."""
    if f"{name}.weight" in weights:
        return dense_like(layer) if isinstance(layer, LowRankLinear) else None
    up, down = weights.get(f"{name}.up.weight"), weights.get(f"{name}.down.weight")
    if up is None or down is None or (isinstance(layer, LowRankLinear) and layer.rank == len(down)):
        return None
    m, n = shape_of(layer)
    if up.shape != (m, len(down)) or down.shape[1] != n:
        raise CheckpointError(
            f"{name} is ({m}, {n}) in the model, but its factors are up {tuple(up.shape)} and down "
            f"{tuple(down.shape)} in the checkpoint; load it into the model it was saved from"
        )
    return low_rank_like(layer, len(down))


def _refuse_foreign(
    model: nn.Module, replaced: Mapping[str, nn.Module], weights: Mapping[str, Any], strict: bool
) -> None:
    """Raises CheckpointError when `model`, with layers replaced, would not load the weights."""
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
        if isinstance(value, Tensor) and not name.endswith(LOADING_NOTE)
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
    """Whether a module may rename or convert what it loads, so that only itself can tell what fits."""
    if isinstance(module, LowRankLinear):
        return False
    overridden = type(module)._load_from_state_dict is not nn.Module._load_from_state_dict  # noqa: SLF001
    return overridden or bool(module._load_state_dict_pre_hooks)  # noqa: SLF001
