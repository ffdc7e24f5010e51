"""Hidden widths whose order is free: found by the order in which layers run, and proved by outputs of modules.

Permuting the outputs of all layers that write a hidden width, and the inputs of the layer that reads it, does not
change the function of a feed-forward network, unless something in between treats channels differently. This is tried:
the module around these layers runs again on its own inputs, with permuted weights.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

from torch import nn

from zssvd_lightning.calibration.contexts import PLAIN
from zssvd_lightning.calibration.widths.trials import Width, can_be_narrower, is_free
from zssvd_lightning.model.targets import Target

MOST_TARGETS = 16
"""Largest number of layers to compress in a module that is run again. Whole models are not."""


class FreeWidths:
    """Hidden widths of a model, and whether the order of each is free.

    Every width is tried in the first batch that reaches it, and again when its module is called with other flags. A
    width is not free if a later batch has its layers run in another way.

    Attributes:
        narrows: True to count only widths as free that can also be narrower; see `can_be_narrower`.
        verdicts: whether the order is free, by width. Widths that were not tried are missing.
        calls: calls of modules for which widths were tried, told apart by their flags.
    """

    def __init__(self) -> None:
        self.narrows = False
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
        trial = _Trial(model, targets, leaders, hooked, self.verdicts, self.calls, self.narrows)
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
        narrows: bool,
    ) -> None:
        self._targets, self._leaders, self._hooked, self._known = targets, leaders, hooked, dict(known)
        self._calls, self._narrows = calls, narrows
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
                    free = free and (not self._narrows or can_be_narrower(module, width, self._targets, args, kwargs))
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


def _flags(value: Any) -> Any:
    """Return what tells apart calls of a module that may take other paths: all but the values of tensors."""
    if isinstance(value, tuple | list):
        return tuple(map(_flags, value))
    if isinstance(value, dict):
        return tuple((key, _flags(part)) for key, part in value.items())
    return value if isinstance(value, PLAIN) else type(value)
