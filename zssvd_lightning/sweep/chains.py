"""Search for the blocks of a model by its structure, and proof that gradients pass from block to block alone."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zssvd_lightning.calibration.contexts import measuring
from zssvd_lightning.calibration.gradients import checked_loss
from zssvd_lightning.calibration.hooks import observing
from zssvd_lightning.calibration.masks import TokenMask
from zssvd_lightning.distributed import LayerSet
from zssvd_lightning.errors import CalibrationError
from zssvd_lightning.sweep.calls import WHOLE, tensors_of
from zssvd_lightning.sweep.candidates import (
    Candidate,
    candidates_of,
    chosen_of,
    is_in,
    numbers_in_linear_layers,
    watching,
)
from zssvd_lightning.sweep.seal import Chain, Seal, Step, nothing_saved, reached_from
from zssvd_lightning.whitening.moments import Moments

logger = logging.getLogger(__name__)


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
    candidates = candidates_of(model, layers)
    events: list[tuple[str, str]] = []
    with ExitStack() as hooks, observing(model, layers, Moments(), mask, inputs=False) as observation:
        observation.check_operands(1)
        hooks.enter_context(watching(candidates, events))
        for name, target in layers.items():
            call = partial(_call, name, events)
            hooks.callback(target.module.register_forward_pre_hook(call).remove)
        loss()
    sizes = {name: m * m + n * n + m * n for name, (m, n) in layers.shapes.items()}
    chosen = chosen_of(candidates, numbers_in_linear_layers(model), events)
    if not chosen:
        reasons = "; ".join(f"{c.name or 'the model'}: {c.wrong}" for c in candidates[:3] if c.wrong is not None)
        raise CalibrationError(
            "the model has no list of blocks that run one after the other, each on the output of the previous one"
            + (f" ({reasons})" if reasons else "")
            + f"; {WHOLE}"
        )
    _warn_of_outside(chosen, candidates, sizes)
    return [Chain(c.name, c.blocks) for c in chosen], _regions(chosen, events)


def _warn_of_outside(chosen: Sequence[Candidate], candidates: Sequence[Candidate], sizes: Mapping[str, int]) -> None:
    """Warn if the layers outside of all blocks have more statistics than the largest block."""
    of_blocks = [sum(sizes[n] for n in sizes if is_in(n, block)) for c in chosen for block in c.blocks]
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


def _regions(chosen: Sequence[Candidate], events: Iterable[tuple[str, str]]) -> dict[str, int]:
    """Return the number of chains before the first call of each layer. Calls inside of blocks are included."""
    last_blocks = [next(reversed(c.blocks)) for c in chosen]
    region, regions = 0, dict[str, int]()
    for kind, name in events:
        if kind == "call":
            regions.setdefault(name, region)
        elif kind == "enter" and name in last_blocks:
            region += 1
    return regions


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
