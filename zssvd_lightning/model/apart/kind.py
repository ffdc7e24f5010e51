"""Kinds of modules whose weights are compressed as linear layers, and proof that the replacement computes the same."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from zssvd_lightning._contexts import evaluation_mode
from zssvd_lightning._numerics import exact_products
from zssvd_lightning.layers.base import HOOKS
from zssvd_lightning.model.peft_layers import wraps_by_peft

SPREAD = "its parameters are spread over processes"
"""Why a module is not taken apart whose parameters are sharded."""


class Kind:
    """Modules of one kind, which are taken apart into linear layers for a compression and put together again.

    Attributes:
        what: what a log or a report calls them.
        told: what is done with one, in an error under a strategy that cannot do it.
        instead: how to leave one as it is, with its `{name}`.
        opt_in: setting on whose request they are taken apart; None if they always are.
        form: class that takes the place of one. It is made of the module it replaces.
        separates: True if several layers share the memory of one parameter.
    """

    what: ClassVar[str]
    told: ClassVar[str]
    instead: ClassVar[str] = "add {name}.* to ignore"
    opt_in: ClassVar[str | None] = None
    form: ClassVar[type[nn.Module]]
    separates: ClassVar[bool] = True

    def find(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the modules of a model that are whole, by qualified name in module order."""
        raise NotImplementedError

    def parts(self, module: nn.Module) -> list[str]:
        """Return the names that the linear layers of a whole module get, relative to the module."""
        raise NotImplementedError

    def fault(self, module: nn.Module) -> str | None:
        """Return why a whole module cannot be taken apart because of its class or settings; None if it can."""
        return None

    def weights(self, module: nn.Module) -> list[Tensor | None]:
        """Return the parameters that linear layers will hold; None for one that is not there."""
        return list(module.parameters(recurse=False))

    def whole(self, new: Any, old: nn.Module | None) -> nn.Module:
        """Return the whole module with the present weights of `new`, which are written to `old` if it is given."""
        raise NotImplementedError

    def empty(self, new: Any) -> nn.Module:
        """Return the whole module for `new`, without values."""
        made: nn.Module = new.empty()
        return made

    def only_whole(self, new: Any) -> str:
        """Return the name of a parameter that the whole module for `new` has, and `new` has not."""
        raise NotImplementedError

    def difference(self, old: nn.Module, new: Any) -> str | None:
        """Return how the outputs of `new` differ from those of the module it replaces; None if they do not."""
        return None

    def settle(self, model: nn.Module) -> None:
        """Adapt other modules to replacements that were made or undone."""


def why_whole(kind: Kind, model: nn.Module) -> dict[str, str]:
    """Return the modules of a kind that cannot be taken apart, by name, each with the reason."""
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    wrapped = tuple(f"{name}." for name, module in model.named_modules() if name and wraps_by_peft(module))
    found = {}
    for name, module in kind.find(model).items():
        if not name:
            reason: str | None = "it is the model itself, which cannot be replaced; put it into another module"
        elif name.startswith(wrapped):
            reason = "PEFT adapts it; merge the adapter first"
        elif _is_spread(weights := kind.weights(module), module):
            reason = SPREAD
        else:
            reason = kind.fault(module) or _why_not(weights, module, owners)
        if reason is not None:
            found[name] = reason
    return found


def _is_spread(weights: Sequence[Tensor | None], module: nn.Module) -> bool:
    return any(isinstance(weight, DTensor) for weight in weights) or getattr(module, "_is_expert_parallel", False)


def _why_not(weights: Sequence[Tensor | None], module: nn.Module, owners: Counter[int]) -> str | None:
    """Return why a module with these parameters cannot be taken apart; None if it can be tried."""
    present = [weight for weight in weights if weight is not None]
    if any(not weight.is_floating_point() or weight.dtype.itemsize < 2 for weight in present):
        return f"its parameters are {present[0].dtype}, which holds quantized codes"
    if any(owners[id(weight)] > 1 for weight in present):
        return "its parameters are tied to those of another module"
    computed = len(present) < len(weights) or any(type(weight) is not nn.Parameter for weight in present)
    if computed or torch.nn.utils.parametrize.is_parametrized(module):
        return "its parameters are computed from others"
    return None


@torch.no_grad()
def difference_in(old: nn.Module, new: nn.Module, calls: Sequence[tuple[Any, ...]], what: str) -> str | None:
    """Return how the outputs of a replacement differ from those of the module it replaces; None if they do not.

    Both run in evaluation mode and without their hooks. The outputs must be equal up to the square root of the
    precision of their type, relative to the largest one.

    Args:
        old: the module to replace.
        new: its replacement.
        calls: arguments of each call. Tensors are copied.
        what: words on the arguments.
    """
    weight = next(new.parameters())
    if weight.is_meta:
        return "its values are not in memory; load the model without device_map"
    try:
        with (
            _without_hooks(old, new),
            evaluation_mode(old),
            evaluation_mode(new),
            exact_products(),
            torch.autocast(weight.device.type, enabled=False),
        ):
            expected, found = ([y for call in calls for y in _outputs(module, call)] for module in (old, new))
    except Exception as error:  # noqa: BLE001  modules are of any type
        return f"it does not run on {what}: {error}"
    if [y.shape for y in expected] != [y.shape for y in found]:
        return f"for {what} it returns {[tuple(y.shape) for y in expected]}, not {[tuple(y.shape) for y in found]}"
    for one, other in zip(expected, found, strict=True):
        rest, size = float((one - other).abs().max()), float(one.abs().max())
        if not rest <= torch.finfo(weight.dtype).eps ** 0.5 * size:
            return f"as separate linear layers they give other outputs, by {rest:.3g} of {size:.3g}"
    return None


def _outputs(module: nn.Module, call: tuple[Any, ...]) -> list[Tensor]:
    output = module(*(each.clone() if isinstance(each, Tensor) else each for each in call))
    return [each.float() for each in _flat(output)]


def _flat(output: Any) -> Iterator[Tensor]:
    """Yield the tensors of an output, which may be in tuples within each other."""
    if isinstance(output, tuple):
        for part in output:
            yield from _flat(part)
    elif output is not None:
        yield output


@contextmanager
def _without_hooks(*modules: nn.Module) -> Iterator[None]:
    """Take the hooks off the modules themselves within the context."""
    bare = vars(nn.Module())
    hooks = [{kind: vars(module)[kind] for kind in HOOKS} for module in modules]
    try:
        for module in modules:
            vars(module).update({kind: bare[kind] for kind in HOOKS})
        yield
    finally:
        for module, theirs in zip(modules, hooks, strict=True):
            vars(module).update(theirs)
