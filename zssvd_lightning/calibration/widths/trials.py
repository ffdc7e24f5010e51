"""Trials of a hidden width: whether the order of its units is free, and whether it can have fewer of them.

The module around the layers of the width runs again on its own inputs, with other weights in their place.
"""

import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from zssvd_lightning._contexts import overridden
from zssvd_lightning._numerics import accumulated, exact_products
from zssvd_lightning.calibration.contexts import PLAIN, measuring
from zssvd_lightning.layers.base import HOOKS
from zssvd_lightning.model.targets import Target

logger = logging.getLogger(__name__)


class Width(NamedTuple):
    """Hidden width between layers."""

    producers: tuple[str, ...]
    """Layers that write it: they read one input, and have equally many outputs."""
    consumer: str
    """Layer that reads it."""

    @property
    def members(self) -> tuple[str, ...]:
        """Layers that meet in it."""
        return (*self.producers, self.consumer)


def hooked_modules(model: nn.Module) -> set[nn.Module]:
    """Return the modules that have hooks around their forward or backward pass."""
    return {module for module in model.modules() if any(module.__dict__[kind] for kind in _HOOKS)}


_HOOKS = [kind for kind in HOOKS if kind != "_is_full_backward_hook"]


def is_free(
    module: nn.Module, width: Width, targets: Mapping[str, Target], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bool:
    """Return whether the output of a module does not depend on the order of a hidden width in it.

    The module runs again on its inputs, in float32 or wider, in evaluation mode, without hooks, and with the same
    random numbers: as it is, with all layers of the width permuted, and with the producers alone permuted. The first
    two outputs must be equal to rounding, and the third must differ by much more. Other parameters of this size, such
    as those of a norm in between, are changed in all three, since they may be equal by chance. The module is left as it
    was. It is not free if it cannot be run again, or keeps something of its forward pass.

    Args:
        module: module that holds all layers of the width.
        width: the layers.
        targets: layers to compress, by name.
        args: positional arguments of the module's forward pass.
        kwargs: keyword arguments of the module's forward pass.
    """
    try:
        given = _changed((args, dict(kwargs)), _widened)
        plain, both, alone = _permuted(module, width, targets)
        expected = _output(module, plain, *given)
        size, rounding = _distance(expected), max(torch.finfo(part.dtype).eps for part in expected)
        rest = _distance(expected, _output(module, both, *given))
        if rounding > torch.finfo(torch.float32).eps or rest > 1e-2 * size:
            return False
        effect = _distance(expected, _output(module, alone, *given))
    except Exception as error:  # noqa: BLE001  modules and their arguments are of any type
        logger.debug("the order of the inputs of %s is not known to be free: %s", width.consumer, error)
        return False
    return effect > 100 * rounding * size and rest <= rounding**0.5 * effect


def can_be_narrower(
    module: nn.Module, width: Width, targets: Mapping[str, Target], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bool:
    """Return whether the layers of a hidden width can have fewer units, and the module around them runs with these.

    The module runs again as for `is_free`, with half of the units: once with zeros in the columns of the consumer for
    the others, and once with weights that lack them. The outputs must be equal to rounding, and differ by much more
    from that with all units. A mean over the units, or a shape that counts on their number, is thus found out.

    Arguments: see `is_free`.
    """
    try:
        given = _changed((args, dict(kwargs)), _widened)
        plain, emptied, fewer, sizes = _with_fewer(module, width, targets)
        expected, without = _output(module, plain, *given), _output(module, emptied, *given)
        with _of_sizes(sizes):
            found = _output(module, fewer, *given)
        size, rounding = _distance(expected), max(torch.finfo(part.dtype).eps for part in expected)
        effect, rest = _distance(expected, without), _distance(without, found)
    except Exception as error:  # noqa: BLE001  modules and their arguments are of any type
        logger.debug("the inputs of %s are not known to be removable: %s", width.consumer, error)
        return False
    return effect > 100 * rounding * size and rest <= rounding**0.5 * effect


def _with_fewer(
    module: nn.Module, width: Width, targets: Mapping[str, Target]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], dict[nn.Module, int]]:
    """Return values of three runs: as they are, without half of the units, and narrower; and the sizes of the last."""
    found = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    _refuse_elsewhere(found)
    h = targets[width.consumer].shape[1]
    units = torch.randperm(h, generator=torch.Generator().manual_seed(0))[: h // 2 + 1].sort().values
    name_of = {id(value): name for name, value in found.items()}
    plain = {name: _widened(value) for name, value in found.items()}
    emptied, fewer = dict(plain), dict(plain)
    for part, dim in _sides(width, targets):
        name = name_of[id(part)]
        fewer[name] = plain[name].index_select(dim, units.to(part.device))
    gone = torch.ones(h, dtype=torch.bool).index_fill(0, units, False).nonzero().flatten()
    emptied[name] = plain[name].index_fill(dim, gone.to(part.device), 0.0)  # the consumer is the last of the sides
    sizes: dict[nn.Module, int] = {targets[producer].module: len(units) for producer in width.producers}
    return plain, emptied, fewer, sizes


@contextmanager
def _of_sizes(sizes: Mapping[nn.Module, int]) -> Iterator[None]:
    """Give layers that reshape their outputs by an attribute (`Conv1D`) another number of them."""
    with ExitStack() as stack:
        for module, size in sizes.items():
            if isinstance(module, Conv1D):
                stack.enter_context(overridden(module, nf=size))
        yield


def _sides(width: Width, targets: Mapping[str, Target]) -> Iterator[tuple[Tensor, int]]:
    """Yield the parameters that have the hidden units on a side, and the number of that side."""
    for layer in (targets[name].module for name in width.producers):
        yield layer.weight, int(isinstance(layer, Conv1D))
        if layer.bias is not None:
            yield layer.bias, 0
    reader = targets[width.consumer].module
    yield reader.weight, int(not isinstance(reader, Conv1D))


def _refuse_elsewhere(found: Mapping[str, Tensor]) -> None:
    """Raise TypeError if parameters or buffers are not whole, or not in memory."""
    if any(isinstance(value, DTensor) or value.is_meta for value in found.values()):
        raise TypeError("it has parameters that are not whole, or not in memory")


def _permuted(module: nn.Module, width: Width, targets: Mapping[str, Target]) -> list[dict[str, Tensor]]:
    """Return parameters and buffers for three runs: as they are, all layers permuted, and the producers permuted."""
    found = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    _refuse_elsewhere(found)
    h, generator = targets[width.consumer].shape[1], torch.Generator().manual_seed(0)
    order = torch.randperm(h, generator=generator)
    name_of = {id(value): name for name, value in found.items()}
    members = {id(value) for name in width.members for value in targets[name].module.parameters()}
    plain = {name: _widened(value) for name, value in found.items()}
    for name, value in module.named_parameters():
        if h in value.shape and value.is_floating_point() and id(value) not in members:
            noise = torch.rand(value.shape, generator=generator).to(plain[name]) - 0.5
            plain[name] += noise * (float(plain[name].square().mean().sqrt()) or 1.0)
    alone = {name: value.clone() for name, value in plain.items()}
    *written, (weight, side) = _sides(width, targets)
    for part, dim in written:
        name = name_of[id(part)]
        alone[name] = plain[name].index_select(dim, order.to(part.device))
    both, name = {name: value.clone() for name, value in alone.items()}, name_of[id(weight)]
    both[name] = plain[name].index_select(side, order.to(weight.device))
    return [plain, both, alone]


@torch.no_grad()
def _output(
    module: nn.Module, values: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Tensor]:
    """Return the tensors in the output of a module with other parameters and buffers; the module stays as it is.

    Raises:
        TypeError: the output holds something else than tensors, or the module keeps something of the pass.
    """
    args, kwargs = _changed((args, kwargs), torch.clone)  # a module may change its inputs in place
    used, device = dict(values), next(iter(values.values())).device.type
    versions = {name: value._version for name, value in values.items()}  # noqa: SLF001
    with measuring(module), _stateless(module), torch.autocast(device, enabled=False), exact_products():
        output = functional_call(module, used, args, kwargs)
    if any(used[name] is not value or value._version != versions[name] for name, value in values.items()):  # noqa: SLF001
        raise TypeError("its buffers change in a forward pass")
    found: list[Tensor] = []

    def note(part: Tensor) -> None:
        found.append(part)

    _changed(dict(output) if isinstance(output, Mapping) else output, note)
    return [part for part in found if part.is_floating_point()]


@contextmanager
def _stateless(module: nn.Module) -> Iterator[None]:
    """Run a module without its hooks and put back all its attributes. Raise TypeError if it keeps objects in them."""
    before = [(part, dict(vars(part))) for part in module.modules()]
    try:
        for part, _ in before:
            part.__dict__.update({kind: OrderedDict() for kind in _HOOKS})
        bare = [(dict(vars(part)), _sizes(part)) for part, _ in before]
        yield
        for (part, _), (attributes, sizes) in zip(before, bare, strict=True):
            kept = [name for name, value in vars(part).items() if value is not attributes.get(name)]
            if any(not isinstance(vars(part)[name], PLAIN) for name in kept) or _sizes(part) != sizes:
                raise TypeError(f"{type(part).__name__} keeps something of a forward pass in its attributes")
    finally:
        for part, attributes in before:
            part.__dict__.clear()
            part.__dict__.update(attributes)


def _sizes(module: nn.Module) -> dict[str, int]:
    """Return the number of entries in each container that a module has as an attribute."""
    return {name: len(value) for name, value in vars(module).items() if isinstance(value, list | dict | set)}


def _widened(value: Tensor) -> Tensor:
    """Return a copy of a tensor, in float32 or wider if it is of floating point."""
    return value.detach().to(accumulated(value.dtype) if value.is_floating_point() else value.dtype, copy=True)


def _changed(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Return nested tuples, lists and dictionaries with every tensor changed. Raise TypeError for other objects."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        parts = [_changed(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if type(value) is dict:
        return {key: _changed(part, change) for key, part in value.items()}
    if isinstance(value, PLAIN):
        return value
    raise TypeError(f"it takes or returns a {type(value).__name__}, which may change")


def _distance(first: Sequence[Tensor], second: Sequence[Tensor] | None = None) -> float:
    """Return the Frobenius norm of the difference between outputs, or of the first one."""
    others = [torch.zeros_like(part) for part in first] if second is None else second
    return math.sqrt(sum(float((a - b).double().square().sum()) for a, b in zip(first, others, strict=True)))
