"""Hidden widths whose order is free: found by the order in which layers run, and proved by outputs of modules.

Permuting the outputs of all layers that write a hidden width, and the inputs of the layer that reads it, does not
change the function of a feed-forward network, unless something in between treats channels differently. This is tried:
the module around these layers runs again on its own inputs, with permuted weights.
"""

import logging
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from zssvd_lightning._numerics import accumulated, exact_products
from zssvd_lightning.calibration.contexts import PLAIN, measuring
from zssvd_lightning.layers.base import HOOKS
from zssvd_lightning.model.targets import Target

logger = logging.getLogger(__name__)

MOST_TARGETS = 16
"""Largest number of layers to compress in a module that is run again. Whole models are not."""


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


class FreeWidths:
    """Hidden widths of a model, and whether the order of each is free.

    Every width is tried in the first batch that reaches it, and again when its module is called with other flags. A
    width is not free if a later batch has its layers run in another way.

    Attributes:
        verdicts: whether the order is free, by width. Widths that were not tried are missing.
        calls: calls of modules for which widths were tried, told apart by their flags.
    """

    def __init__(self) -> None:
        self.verdicts: dict[Width, bool] = {}
        self.calls: set[tuple[Width, str]] = set()

    @classmethod
    def of_all(cls, states: Sequence[Sequence[Sequence[Any]]]) -> "FreeWidths":
        """Return what all processes know, by the `state_dict` of each. A width must not be fixed on any of them."""
        widths = cls()
        for producers, consumer, free in (each for state in states for each in state):
            width = Width(tuple(producers), consumer)
            widths.verdicts[width] = widths.verdicts.get(width, True) and free
        return widths

    @property
    def free(self) -> list[Width]:
        """Widths whose order is free, in the order in which they were tried."""
        return [width for width, free in self.verdicts.items() if free]

    @contextmanager
    def watching(
        self, model: nn.Module, targets: Mapping[str, Target], leaders: Mapping[str, str], hooked: Collection[nn.Module]
    ) -> Iterator[None]:
        """Try the widths that the forward passes within the context reach. All hooks are removed on any exit.

        Args:
            model: the model, in evaluation mode.
            targets: layers to compress, by name.
            leaders: layer -> first layer that reads the same input; filled while the layers run.
            hooked: modules with hooks of others, which another pass must not call.
        """
        trial = _Trial(model, targets, leaders, hooked, self.verdicts, self.calls)
        with ExitStack() as hooks:
            trial.watch(hooks)
            yield
        self.verdicts |= trial.verdicts()

    def state_dict(self) -> list[list[Any]]:
        """Return producers, consumer and verdict of each width, as plain types."""
        return [[list(width.producers), width.consumer, free] for width, free in self.verdicts.items()]

    def load_state_dict(self, state: Sequence[Sequence[Any]]) -> None:
        """Load a `state_dict`."""
        self.verdicts = self.of_all([state]).verdicts

    def progress(self) -> dict[str, Any]:
        """Return verdicts and calls as plain types, so that no width is tried again after `take_up`."""
        calls = [[list(width.producers), width.consumer, flags] for width, flags in sorted(self.calls)]
        return {"verdicts": self.state_dict(), "calls": calls}

    def take_up(self, progress: Mapping[str, Any]) -> None:
        """Continue from a `progress`."""
        self.load_state_dict(progress["verdicts"])
        self.calls = {(Width(tuple(producers), consumer), flags) for producers, consumer, flags in progress["calls"]}


def hooked_modules(model: nn.Module) -> set[nn.Module]:
    """Return the modules that have hooks around their forward or backward pass."""
    return {module for module in model.modules() if any(module.__dict__[kind] for kind in _HOOKS)}


_HOOKS = [kind for kind in HOOKS if kind != "_is_full_backward_hook"]


class _Trial:
    """Widths that are reached in one batch. Arguments as in `FreeWidths.watching`."""

    def __init__(
        self,
        model: nn.Module,
        targets: Mapping[str, Target],
        leaders: Mapping[str, str],
        hooked: Collection[nn.Module],
        known: Mapping[Width, bool],
        calls: set[tuple[Width, str]],
    ) -> None:
        self._targets, self._leaders, self._hooked, self._known = targets, leaders, hooked, dict(known)
        self._calls = calls
        self._places: dict[nn.Module, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self._places.setdefault(module, []).append(name)
        self._ran: list[str] = []
        self._home: dict[Width, nn.Module] = {}
        self._found: dict[Width, bool] = {}
        self._runs_inside: Counter[tuple[Width, str]] = Counter()

    def watch(self, hooks: ExitStack) -> None:
        """Register the hooks on the layers, and on the modules around them."""
        layers = {target.module for target in self._targets.values()}
        for name, target in self._targets.items():
            handle = target.module.register_forward_pre_hook(lambda *_, name=name: self._ran.append(name))
            hooks.callback(handle.remove)
        for module in self._places:
            if module not in layers and 2 <= len(layers.intersection(module.modules())) <= MOST_TARGETS:
                starts: list[int] = []
                before = module.register_forward_pre_hook(lambda *_, starts=starts: starts.append(len(self._ran)))
                hooks.callback(before.remove)
                after = module.register_forward_hook(self._after(starts), with_kwargs=True, prepend=True)
                hooks.callback(after.remove)

    def verdicts(self) -> dict[Width, bool]:
        """Return the verdicts of this batch. Layers that also ran elsewhere make their widths not free."""
        total = Counter(self._ran)
        return {
            width: free and all(total[name] == self._runs_inside[width, name] for name in width.members)
            for width, free in (self._known | self._found).items()
        }

    def _after(self, starts: list[int]) -> Callable[..., None]:
        """Return a hook that tries the widths in a module after its forward pass, while FSDP2 has its weights whole."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            ran = self._ran[starts.pop() :]
            for width in self._widths_in(ran):
                if self._home.setdefault(width, module) is not module:
                    continue
                call, known = (width, str(_flags((args, kwargs)))), self._known.get(width, True)
                free = self._found.get(width, known) and self._is_within(width, module) and not self._is_hooked(module)
                if free and (width not in self._known or call not in self._calls):
                    free = is_free(module, width, self._targets, args, kwargs)
                self._calls.add(call)
                self._found[width] = free
                self._runs_inside.update((width, name) for name in ran if name in width.members)

        return hook

    def _widths_in(self, ran: Sequence[str]) -> Iterator[Width]:
        """Yield the hidden widths that a sequence of layers may have: a consumer runs right after its producers."""
        names = list(dict.fromkeys(ran))
        for place, consumer in enumerate(names):
            h, leader = self._targets[consumer].shape[1], self._leaders[names[place - 1]] if place else None
            sharing = [name for name in names if self._leaders[name] == leader]
            producers = [name for name in sharing if self._targets[name].shape[0] == h]
            precede = names[place - 1] in producers and set(producers) <= set(names[:place])
            if precede and self._reads_alone(consumer):
                yield Width(tuple(producers), consumer)

    def _reads_alone(self, consumer: str) -> bool:
        """Return True if no other layer reads the same input."""
        readers = (name for name in self._targets if self._leaders.get(name) == self._leaders[consumer])
        return list(islice(readers, 2)) == [consumer]

    def _is_within(self, width: Width, module: nn.Module) -> bool:
        """Return whether the layers have no place outside the module."""
        inside = tuple(f"{place}." if place else "" for place in self._places[module])
        return all(
            place.startswith(inside) for name in width.members for place in self._places[self._targets[name].module]
        )

    def _is_hooked(self, module: nn.Module) -> bool:
        return any(part in self._hooked for part in module.modules() if part is not module)


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


def _permuted(module: nn.Module, width: Width, targets: Mapping[str, Target]) -> list[dict[str, Tensor]]:
    """Return parameters and buffers for three runs: as they are, all layers permuted, and the producers permuted."""
    found = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if any(isinstance(value, DTensor) or value.is_meta for value in found.values()):
        raise TypeError("it has parameters that are not whole, or not in memory")
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
    for layer in (targets[name].module for name in width.producers):
        for part, dim in ((layer.weight, int(isinstance(layer, Conv1D))), (layer.bias, 0)):
            if part is not None:
                name = name_of[id(part)]
                alone[name] = plain[name].index_select(dim, order.to(part.device))
    both, reader = {name: value.clone() for name, value in alone.items()}, targets[width.consumer].module
    name, dim = name_of[id(reader.weight)], int(not isinstance(reader, Conv1D))
    both[name] = plain[name].index_select(dim, order.to(reader.weight.device))
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


def _flags(value: Any) -> Any:
    """Return what tells apart calls of a module that may take other paths: all but the values of tensors."""
    if isinstance(value, tuple | list):
        return tuple(map(_flags, value))
    if isinstance(value, dict):
        return tuple((key, _flags(part)) for key, part in value.items())
    return value if isinstance(value, PLAIN) else type(value)


def _distance(first: Sequence[Tensor], second: Sequence[Tensor] | None = None) -> float:
    """Return the Frobenius norm of the difference between outputs, or of the first one."""
    others = [torch.zeros_like(part) for part in first] if second is None else second
    return math.sqrt(sum(float((a - b).double().square().sum()) for a, b in zip(first, others, strict=True)))
