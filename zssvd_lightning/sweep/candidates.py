"""Lists of modules that may be the blocks of a model, by how their modules run. Sweeps and estimates go by them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from zssvd_lightning.errors import CalibrationError
from zssvd_lightning.model.targets import refusals
from zssvd_lightning.sweep.calls import hidden_of, output_of

MOST_IN_A_BLOCK = 0.75
"""Fraction of the numbers of a chain in its largest block, above which chains inside are used instead."""


@dataclass
class Candidate:
    """Container whose items may be blocks."""

    name: str
    blocks: dict[str, nn.Module]
    entered: int = 0
    left: int = 0
    last: Tensor | None = None
    wrong: str | None = None


def candidates_of(model: nn.Module, layers: Iterable[str]) -> list[Candidate]:
    """Return the lists of two modules or more that hold target layers.

    Args:
        model: the model.
        layers: names of the target layers.
    """
    names = {
        ".".join(parts[:depth]) for name in layers for parts in [name.split(".")] for depth in range(len(parts) + 1)
    }
    return [
        Candidate(name, {f"{name}.{key}" if name else key: item for key, item in module.named_children()})
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1 and name in names
    ]


@contextmanager
def watching(candidates: Sequence[Candidate], events: list[tuple[str, str]]) -> Iterator[None]:
    """Note how the modules of candidates run in the forward pass within the context.

    Args:
        candidates: the candidates; what is wrong with them is noted in them.
        events: list to which `("enter", name)` is added for each module.
    """
    with ExitStack() as hooks:
        for candidate in candidates:
            for number, (name, module) in enumerate(candidate.blocks.items()):
                enter, leave = partial(_enter, candidate, number, name, events), partial(_leave, candidate, name)
                hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(leave).remove)
        yield
    for candidate in candidates:
        if candidate.wrong is None and candidate.left < len(candidate.blocks):
            candidate.wrong = f"{candidate.left} of its {len(candidate.blocks)} modules ran"


def chosen_of(
    candidates: Sequence[Candidate], sizes: Mapping[str, int], events: Sequence[tuple[str, str]]
) -> list[Candidate]:
    """Return the candidates whose modules are the blocks of a model, in the order in which they run.

    Args:
        candidates: all candidates, after a pass.
        sizes: number of weights of each layer; see `numbers_in_linear_layers`.
        events: those of `watching`.
    """
    chosen = _outermost([c for c in candidates if c.wrong is None], sizes)
    return sorted(chosen, key=lambda c: events.index(("enter", next(iter(c.blocks)))))


def _outermost(valid: Sequence[Candidate], sizes: Mapping[str, int]) -> list[Candidate]:
    """Return the outermost candidates, or those inside of one that has most of its numbers in a single block."""
    chosen: list[Candidate] = []
    for candidate in valid:
        if any(other is not candidate and is_in(candidate.name, other.name) for other in valid):
            continue
        numbers = {b: sum(size for n, size in sizes.items() if is_in(n, b)) for b in candidate.blocks}
        largest = max(numbers, key=lambda block: numbers[block])
        inner = [c for c in valid if c is not candidate and is_in(c.name, candidate.name)]
        alone = numbers[largest] > MOST_IN_A_BLOCK * sum(numbers.values())
        chosen += _outermost(inner, sizes) if alone and any(is_in(c.name, largest) for c in inner) else [candidate]
    return chosen


def numbers_in_linear_layers(model: nn.Module) -> dict[str, int]:
    """Return the number of weights of each layer that could be a target, whether it is one or not."""
    others = refusals(model)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    return {name: module.weight.numel() for name, module in linears.items() if name not in others}


def is_in(name: str, outer: str) -> bool:
    """Return True if a module is another one or inside of it, by their names."""
    return name == outer or not outer or name.startswith(f"{outer}.")


def _enter(
    candidate: Candidate,
    number: int,
    name: str,
    events: list[tuple[str, str]],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    events.append(("enter", name))
    if candidate.wrong is not None:
        return
    try:
        hidden = hidden_of(name, args, kwargs, candidate.last)
    except CalibrationError as error:
        candidate.wrong = str(error)
        return
    if number != candidate.entered or number != candidate.left:
        candidate.wrong = f"{name} does not run once, after the one before it"
    elif number and hidden is not candidate.last:
        candidate.wrong = f"{name} does not run on the output of the one before it"
    candidate.entered, candidate.last = number + 1, None


def _leave(candidate: Candidate, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if candidate.wrong is not None:
        return
    try:
        candidate.last = output_of(name, output)
    except CalibrationError as error:
        candidate.wrong = str(error)
    candidate.left += 1
