"""Sizes of a model and of its calibration, by one pass of a batch that takes neither memory nor time."""

import copy
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from zssvd_lightning.compression.memory.typical_experts import (
    all_but_the_first,
    first_experts,
    let_one_stand_for_all,
    shared_rows,
)
from zssvd_lightning.layers.storage import Shape
from zssvd_lightning.model.targets import Target
from zssvd_lightning.offload.mapped_weights import mapped_from_files
from zssvd_lightning.sweep.candidates import candidates_of, chosen_of, is_in, numbers_in_linear_layers, watching

logger = logging.getLogger(__name__)


class Beside(NamedTuple):
    """Bytes on the device that belong to neither the model nor its compression."""

    state: int = 0
    """Bytes of the state of optimizers."""
    parks: bool | str = False
    """The setting `park_optimizer`, which says whether and where the state is parked during the compression."""


@dataclass(frozen=True)
class Extent:
    """Sizes of a model and of its calibration, from which the needs of a compression follow.

    Attributes:
        shapes: shape (m, n) of every target.
        leaders: target -> the first target that reads the same input.
        blocks: targets of each block, and last those outside of all blocks.
        weights: bytes of all weights of the model.
        width: bytes w of one weight.
        stored: bytes of the hidden states and other arguments of all blocks on all batches.
        whole_pass: bytes that a forward and backward pass of one batch through the whole model keeps.
        part_pass: the same through one block, or from the last block to the loss, whichever is larger.
        beside: what else is on the device.
        forward: floating-point operations of the forward pass of one batch; 0 if they are not known.
        rows: target -> rows of its input in one batch, for those that the pass has reached.
        seen: False if no pass was seen, so that activations are not counted.
        mapped: bytes of each block that are mapped from files. By blocks, they are resident only while the block runs.
    """

    shapes: Mapping[str, Shape]
    leaders: Mapping[str, str]
    blocks: tuple[Collection[str], ...]
    weights: int
    width: int
    stored: int = 0
    whole_pass: int = 0
    part_pass: int = 0
    beside: Beside = field(default_factory=Beside)
    forward: int = 0
    rows: Mapping[str, int] = field(default_factory=dict)
    seen: bool = False
    mapped: tuple[int, ...] = ()

    @classmethod
    def of_layers(cls, shapes: Mapping[str, Shape], width: int) -> "Extent":
        """Return the extent of layers of which nothing else is known, as if each read an input of its own."""
        weights = width * sum(m * n for m, n in shapes.values())
        return cls(shapes, {name: name for name in shapes}, (tuple(shapes),), weights, width)


Pass = Callable[[nn.Module], Any]
"""Function that runs a model forward on one batch, of fake tensors if the model has them."""


def extent_of(
    model: nn.Module,
    targets: Mapping[str, Target],
    batches: int,
    forward: Pass | None,
    mapped: Collection[str] | None = None,
) -> Extent:
    """Return the sizes from which needs follow, by one pass of a batch over fake tensors. The model does not change.

    Where the pass fails, which depends on the numbers in some models, activations are not counted, with a warning. All
    experts of a layer get equally many tokens.

    Args:
        model: the model, on any device, also the meta device.
        targets: its target layers.
        batches: number of batches of the calibration.
        forward: pass of one batch; None to count no activations.
        mapped: names of the parameters that are mapped from files; None to find them.
    """
    blocks = _blocks(model, list(targets))  # where the model does not run
    firsts = first_experts(model)
    alike = {name for names in firsts.values() for name in names[1:]}
    watched = [name for name in targets if name not in alike]
    seen = _Seen(watched, blocks, firsts)
    if forward is not None:
        try:
            fake = _faked_model(model, mode := FakeTensorMode(allow_non_fake_inputs=True))
            with mode:
                blocks = _blocks_that_run(model, fake, watched, forward)
                seen = _Seen(watched, blocks, firsts)
                seen.run(fake, forward)
        except Exception as error:  # noqa: BLE001  models and losses are of any kind
            logger.warning("activations are not counted, because the model does not run on fake tensors: %s", error)
            seen = _Seen(watched, blocks, firsts)
    within = [tuple(name for name in targets if is_in(name, block)) for block in blocks]
    outside = tuple(set(targets) - {name for names in within for name in names})
    sizes = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    if mapped is None:
        mapped = mapped_from_files({name: p.detach() for name, p in model.named_parameters()})
    of_file = [sum(sizes.get(name, 0) for name in mapped if name.startswith(f"{block}.")) for block in blocks]
    return Extent(
        shapes={name: target.shape for name, target in targets.items()},
        leaders={name: seen.leaders.get(name, name) for name in targets},
        blocks=(*within, outside),
        weights=sum(sizes.values()),
        width=next(iter(targets.values())).weight.element_size(),
        stored=batches * seen.hidden,
        whole_pass=seen.kept,
        part_pass=max(seen.parts),
        forward=seen.operations,
        rows=seen.rows,
        seen=forward is not None and bool(seen.leaders),
        mapped=tuple(of_file) if any(of_file) else (),
    )


def faked(batch: Any) -> Any:
    """Return a batch whose tensors are fake. Call it within the mode of fake tensors."""
    return tree_map_only(Tensor, torch.empty_like, batch)


def _faked_model(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Return a copy of a model with fake weights, so that nothing fake gets into the model.

    It has one expert of each list, which takes the tokens of all.
    """
    memo: dict[int, Any] = {id(buffer): mode.from_tensor(buffer.detach()) for buffer in model.buffers()}
    left_out = all_but_the_first(model)
    for part in left_out:
        memo[id(part)] = nn.Module()
    unused = {id(parameter) for part in left_out for parameter in part.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in unused:
            memo[id(parameter)] = nn.Parameter(mode.from_tensor(parameter.detach()), requires_grad=False)
    fake = copy.deepcopy(model, memo)
    let_one_stand_for_all(fake)
    return fake


class _Seen:
    """Record of a pass over a copy of a model that has fake weights.

    Attributes:
        leaders: layer -> the first layer that read the same input.
        rows: layer -> rows of its input. Experts of a layer share theirs equally.
        hidden: bytes of the first arguments of all blocks.
        kept: bytes that autograd keeps for the backward pass, without weights.
        parts: those of each block, and of what follows the last.
        operations: floating-point operations of the pass.
    """

    def __init__(self, targets: Sequence[str], blocks: Sequence[str], firsts: Mapping[str, tuple[str, ...]]) -> None:
        self.leaders: dict[str, str] = {}
        self.rows: dict[str, int] = {}
        self.hidden, self.kept, self.parts, self.operations = 0, 0, [0], 0
        self._targets, self._blocks, self._firsts = targets, blocks, firsts
        self._inputs: list[tuple[Tensor, str]] = []
        self._weights: set[int] = set()
        self._storages: dict[int, torch.UntypedStorage] = {}

    def run(self, fake: nn.Module, forward: Pass) -> None:
        """Run a model with fake weights."""
        counter = FlopCounterMode(display=False)
        self._weights = {_address(tensor) for tensor in (*fake.parameters(), *fake.buffers())}
        with ExitStack() as stack:
            for name in self._targets:
                fake.get_submodule(name).requires_grad_(True)
            for name in dict.fromkeys((*self._targets, *self._firsts)):
                layer = fake.get_submodule(name)
                stack.callback(layer.register_forward_pre_hook(partial(self._read, name)).remove)
            for name in self._blocks:
                block = fake.get_submodule(name)
                stack.callback(block.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(self._leave).remove)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(counter)
            forward(fake)
        self.operations = counter.get_total_flops()
        self.rows |= shared_rows(self.rows, self._firsts)
        self._inputs, self._storages = [], {}

    def _read(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args:
            self.leaders[name] = next((leader for tensor, leader in self._inputs if tensor is args[0]), name)
            self.rows[name] = self.rows.get(name, 0) + args[0].numel() // args[0].shape[-1]
            self._inputs.append((args[0], name))

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        self.hidden += 0 if hidden is None else hidden.nbytes
        self.parts.append(0)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.parts.append(0)

    def _keep(self, tensor: Tensor) -> Tensor:
        address, storage = _address(tensor), tensor.untyped_storage()
        if address not in self._weights and address not in self._storages:
            self._storages[address] = storage  # held, so that no other storage gets its address
            self.kept += storage.nbytes()
            self.parts[-1] += storage.nbytes()
        return tensor


def _address(tensor: Tensor) -> int:
    """Return what is equal for tensors that share their storage, which has no address in memory if it is fake."""
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001


def _blocks_that_run(model: nn.Module, fake: nn.Module, names: Sequence[str], forward: Pass) -> list[str]:
    """Return the blocks that a sweep runs one after the other, by a pass over a copy with fake weights."""
    candidates, events = candidates_of(fake, names), list[tuple[str, str]]()
    with torch.enable_grad(), watching(candidates, events):
        forward(fake)
    return [block for c in chosen_of(candidates, numbers_in_linear_layers(model), events) for block in c.blocks]


def _blocks(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Return the modules of the outermost lists that hold targets, which a sweep runs one after the other."""
    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1 and not any(name.startswith(f"{b}.") for b in found):
            items = [f"{name}.{key}" for key, _ in module.named_children()]
            found += items if any(target.startswith(f"{name}.") for target in names) else []
    return found
