"""Search for the blocks of a model by its structure, and proof that gradients pass from block to block alone."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from zssvd_lightning.calibration.contexts import measuring
from zssvd_lightning.calibration.gradients import checked_loss
from zssvd_lightning.calibration.hooks import observing
from zssvd_lightning.calibration.masks import TokenMask
from zssvd_lightning.distributed import LayerSet
from zssvd_lightning.errors import CalibrationError
from zssvd_lightning.model.targets import refusals
from zssvd_lightning.sweep.calls import WHOLE, hidden_of, output_of, tensors_of
from zssvd_lightning.sweep.seal import Chain, Seal, Step, nothing_saved, reached_from
from zssvd_lightning.whitening.moments import Moments

logger = logging.getLogger(__name__)


MOST_IN_A_BLOCK = 0.75
"""Fraction of the numbers of a chain in its largest block, above which chains inside are used instead."""


class Structure(NamedTuple):
    """Chains of a model, and the target layers outside of them."""

    chains: Sequence[Chain]
    """In the order in which they run."""
    inside: Mapping[str, tuple[str, ...]]
    """Block -> the target layers in it."""
    region_of: Mapping[str, int]
    """Target layer outside of all blocks -> region in which it runs; see `Seal`."""

    def outside(self, region: int) -> list[str]:
        """Return the target layers of a region."""
        return [name for name, of in self.region_of.items() if of == region]

    def has_layers_up_to(self, region: int) -> bool:
        """Return True if there are target layers in a region or before it."""
        blocks = [block for chain in self.chains[:region] for block in chain.blocks]
        return any(self.inside[block] for block in blocks) or any(of <= region for of in self.region_of.values())


@dataclass
class _Candidate:
    """Container whose items may be blocks."""

    name: str
    blocks: dict[str, nn.Module]
    entered: int = 0
    left: int = 0
    last: Tensor | None = None
    wrong: str | None = None


def structure_of(model: nn.Module, layers: LayerSet, mask: TokenMask, loss: Callable[[], Tensor]) -> Structure:
    """Return the chains of a model, from two forward passes of one batch that leave no traces.

    Args:
        model: the model.
        layers: the target layers.
        mask: mask of the batch.
        loss: function that returns the loss of the batch.

    Raises:
        CalibrationError: there are no blocks that run one after the other, or the loss depends on their insides other
            than through the next block. The message says why.
    """
    with measuring(model), torch.enable_grad(), nothing_saved():
        chains, calls = _found(model, layers, mask, loss)
    inside = {
        name: tuple(layer for layer in layers if layer == name or layer.startswith(f"{name}."))
        for chain in chains
        for name in chain.blocks
    }
    within = {layer for names in inside.values() for layer in names}
    outside = {name: layers[name].module for name in layers if name not in within}
    region_of = {name: calls.get(name, len(chains)) for name in outside}
    proof = _Proof(chains, outside, region_of, layers, set(calls))
    with (
        measuring(model),
        torch.enable_grad(),
        observing(model, layers, Moments(), mask, inputs=False),
        nothing_saved(),
        proof,
    ):
        proof.refuse_leaks("the loss", len(chains), [checked_loss(loss())])
        proof.refuse_unfinished()
    return Structure(chains, inside, proof.region_of)


def _found(
    model: nn.Module, layers: LayerSet, mask: TokenMask, loss: Callable[[], Tensor]
) -> tuple[list[Chain], dict[str, int]]:
    """Return the chains in the order in which they run, and the regions of the layers called outside of them."""
    candidates = [
        _Candidate(name, {f"{name}.{key}" if name else key: item for key, item in module.named_children()})
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1
    ]
    candidates = [c for c in candidates if any(_is_in(name, c.name) for name in layers)]
    events: list[tuple[str, str]] = []
    with ExitStack() as hooks, observing(model, layers, Moments(), mask, inputs=False) as observation:
        observation.check_operands(1)
        for candidate in candidates:
            for number, (name, module) in enumerate(candidate.blocks.items()):
                enter, leave = partial(_enter, candidate, number, name, events), partial(_leave, candidate, name)
                hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(leave).remove)
        for name, target in layers.items():
            call = partial(_call, name, events)
            hooks.callback(target.module.register_forward_pre_hook(call).remove)
        loss()
    for candidate in candidates:
        if candidate.wrong is None and candidate.left < len(candidate.blocks):
            candidate.wrong = f"{candidate.left} of its {len(candidate.blocks)} modules ran"
    sizes = {name: m * m + n * n + m * n for name, (m, n) in layers.shapes.items()}
    chosen = _chosen([c for c in candidates if c.wrong is None], _numbers_in_linear_layers(model))
    if not chosen:
        reasons = "; ".join(f"{c.name or 'the model'}: {c.wrong}" for c in candidates[:3] if c.wrong is not None)
        raise CalibrationError(
            "the model has no list of blocks that run one after the other, each on the output of the previous one"
            + (f" ({reasons})" if reasons else "")
            + f"; {WHOLE}"
        )
    _warn_of_outside(chosen, candidates, sizes)
    chosen.sort(key=lambda c: events.index(("enter", next(iter(c.blocks)))))
    return [Chain(c.name, c.blocks) for c in chosen], _regions(chosen, events)


def _warn_of_outside(chosen: Sequence[_Candidate], candidates: Sequence[_Candidate], sizes: Mapping[str, int]) -> None:
    """Warn if the layers outside of all blocks have more statistics than the largest block."""
    of_blocks = [sum(sizes[n] for n in sizes if _is_in(n, block)) for c in chosen for block in c.blocks]
    outside = sum(sizes.values()) - sum(of_blocks)
    if outside > max(of_blocks):
        reasons = [f"{c.name}: {c.wrong}" for c in candidates if c.wrong is not None]
        logger.warning(
            "%.1f GB of statistics, of layers outside of %s, are in memory together; the largest block has %.1f GB%s",
            4e-9 * outside,
            " and ".join(c.name or "the model" for c in chosen),
            4e-9 * max(of_blocks),
            f". No list of blocks: {'; '.join(reasons[:3])}" if reasons else "",
        )


def _regions(chosen: Sequence[_Candidate], events: Iterable[tuple[str, str]]) -> dict[str, int]:
    """Return the number of chains before the first call of each layer. Calls inside of blocks are included."""
    last_blocks = [next(reversed(c.blocks)) for c in chosen]
    region, regions = 0, dict[str, int]()
    for kind, name in events:
        if kind == "call":
            regions.setdefault(name, region)
        elif kind == "enter" and name in last_blocks:
            region += 1
    return regions


def _numbers_in_linear_layers(model: nn.Module) -> dict[str, int]:
    """Return the number of weights of each layer that could be a target, whether it is one or not."""
    others = refusals(model)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    return {name: module.weight.numel() for name, module in linears.items() if name not in others}


def _chosen(valid: Sequence[_Candidate], sizes: Mapping[str, int]) -> list[_Candidate]:
    """Return the outermost candidates, or those inside of one that has most of its numbers in a single block."""
    chosen: list[_Candidate] = []
    for candidate in valid:
        if any(other is not candidate and _is_in(candidate.name, other.name) for other in valid):
            continue
        numbers = {b: sum(size for n, size in sizes.items() if _is_in(n, b)) for b in candidate.blocks}
        largest = max(numbers, key=lambda block: numbers[block])
        inner = [c for c in valid if c is not candidate and _is_in(c.name, candidate.name)]
        alone = numbers[largest] > MOST_IN_A_BLOCK * sum(numbers.values())
        chosen += _chosen(inner, sizes) if alone and any(_is_in(c.name, largest) for c in inner) else [candidate]
    return chosen


def _is_in(name: str, outer: str) -> bool:
    return name == outer or not outer or name.startswith(f"{outer}.")


def _enter(
    candidate: _Candidate,
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


def _leave(candidate: _Candidate, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if candidate.wrong is not None:
        return
    try:
        candidate.last = output_of(name, output)
    except CalibrationError as error:
        candidate.wrong = str(error)
    candidate.left += 1


def _call(name: str, events: list[tuple[str, str]], module: nn.Module, args: tuple[Any, ...]) -> None:
    events.append(("call", name))


class _Proof(Seal):
    """Seal that refuses dependences other than from block to block.

    Args:
        chains: the chains.
        outside: target layers outside of all blocks.
        region_of: regions of these layers, completed by what depends on those that are not called.
        layers: all target layers.
        called: names of the layers that are called.
    """

    def __init__(
        self,
        chains: Sequence[Chain],
        outside: Mapping[str, nn.Module],
        region_of: Mapping[str, int],
        layers: LayerSet,
        called: set[str],
    ) -> None:
        super().__init__(chains, outside, region_of)
        self.region_of = dict(region_of)
        self._names = {id(target.module.weight): name for name, target in layers.items()}
        self._called, self._chains = called, chains
        self._first: list[Tensor] = []
        self._seen: set[str] = set()

    def enter(self, step: Step, hidden: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Refuse side tensors that depend on blocks of the same chain, or that the first block does not get."""
        chain, block = step
        name = list(self._chains[chain].blocks)[block]
        sides = [tensor for tensor in tensors_of((args, dict(kwargs))) if tensor is not hidden]
        if block == 0:
            self._first = [hidden, *sides]
            self.refuse_leaks(name, chain, self._first)
            return
        new = [tensor for tensor in sides if not any(tensor is known for known in self._first)]
        if reached := self.refuse_leaks(name, chain, new):
            raise CalibrationError(
                f"{name} gets a tensor that depends on {reached}, and that the first block does not get, so the model "
                f"cannot be run block by block; {WHOLE}"
            )

    def refuse_leaks(self, what: str, region: int, tensors: Sequence[Tensor]) -> str | None:
        """Return a layer or block below a region on which tensors depend; None if there is none.

        Raises:
            CalibrationError: they depend on the inside of a block, or on layers or blocks of another region.
        """
        blocks = {id(leaf): step for step, leaf in self.leaves.items()}
        found = None
        for variable in reached_from(tensors):
            name, step = self._names.get(id(variable)), blocks.get(id(variable))
            if step is not None and step[0] >= region:
                raise CalibrationError(
                    f"{what} depends on the output of block {step[1]} of {self._chains[step[0]].name} other than as "
                    f"hidden states, so the model cannot be run block by block; {WHOLE}"
                )
            if step is not None:
                found = found or self._chains[step[0]].name
            elif name is not None:
                if name not in self.region_of:
                    raise CalibrationError(
                        f"{what} depends on {name}, inside of a block, other than through the output of the block, as "
                        f"a loss of routers would, so the model cannot be run block by block; {WHOLE}"
                    )
                if name not in self._called and name not in self._seen:
                    self.region_of[name] = region
                if self.region_of[name] != region:
                    raise CalibrationError(
                        f"{what} depends on {name} directly as well as through blocks, so that its gradient is not "
                        f"known block by block; add it to ignore, or {WHOLE}"
                    )
                self._seen.add(name)
                found = found or name
        return found
