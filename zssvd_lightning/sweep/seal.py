"""Forward passes whose graph is cut at every block, so that nothing inside a block is kept for a backward pass.

Blocks run with gradients enabled all the same, because torch computes other sums without, which round differently.
"""

import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from zssvd_lightning.errors import CalibrationError
from zssvd_lightning.sweep.calls import WHOLE, hidden_of, output_of, with_output


@dataclass(frozen=True)
class Chain:
    """Blocks that run one after the other, once per forward pass, each on the hidden states of the previous one."""

    name: str
    """Qualified name of the module that holds them."""
    blocks: Mapping[str, nn.Module]
    """The blocks by qualified name, in order."""

    def __len__(self) -> int:
        return len(self.blocks)


Step = tuple[int, int]
"""Number of a chain, and of a block in it."""


class Seal:
    """Context in which the blocks of all chains keep nothing of their graph, and their outputs start a new one.

    Gradients that reach the output of a block are handed to `receive`. The pass is divided into regions: region c is
    what runs after the first c chains and before the next one.

    Args:
        chains: the chains, in the order in which they run.
        outside: target layers outside of all blocks, by name.
        region_of: name -> region in which an outside layer runs.

    Raises:
        CalibrationError: in the forward pass, if the blocks do not run in order, each on the output of the previous
            one, or an outside layer runs in another region.
    """

    def __init__(self, chains: Sequence[Chain], outside: Mapping[str, nn.Module], region_of: Mapping[str, int]) -> None:
        self._steps = [(c, i, name) for c, chain in enumerate(chains) for i, name in enumerate(chain.blocks)]
        self._modules = [module for chain in chains for module in chain.blocks.values()]
        self._outside, self._region_of = outside, region_of
        self._next, self._inside = 0, False
        self._last: Tensor | None = None
        self._leaves: list[tuple[Step, weakref.ref[Tensor]]] = []
        self._hooks, self._dropping = ExitStack(), ExitStack()

    def __enter__(self) -> Self:
        for number, module in enumerate(self._modules):
            entering = module.register_forward_pre_hook(partial(self._enter, number), with_kwargs=True, prepend=True)
            self._hooks.callback(entering.remove)
            self._hooks.callback(module.register_forward_hook(partial(self._leave, number), prepend=True).remove)
        for name, module in self._outside.items():
            self._hooks.callback(module.register_forward_pre_hook(partial(self._check_region, name)).remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()
        self._dropping.close()
        self._last = None

    @property
    def region(self) -> int | None:
        """Present region of the pass; None within a chain."""
        if self._next == len(self._steps):
            return self._steps[-1][0] + 1
        chain, block, _ = self._steps[self._next]
        return chain if block == 0 and not self._inside else None

    @property
    def leaves(self) -> dict[Step, Tensor]:
        """Outputs of blocks that are part of a graph."""
        return {step: leaf for step, reference in self._leaves if (leaf := reference()) is not None}

    def refuse_unfinished(self) -> None:
        """Raise CalibrationError unless all blocks have run."""
        if self._next < len(self._steps):
            raise CalibrationError(
                f"{self._steps[self._next][2]} does not run in every batch, so the model cannot be run block by block; "
                f"{WHOLE}"
            )

    def enter(self, step: Step, hidden: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Do something before a block runs."""

    def leave(self, step: Step, hidden: Tensor) -> None:
        """Do something after a block has run."""

    def receive(self, step: Step, gradient: Tensor) -> None:
        """Do something with a gradient that reaches the output of a block."""

    def _enter(self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        chain, block, name = self._steps[number]
        hidden = hidden_of(name, args, kwargs, self._last)
        if number != self._next or self._inside:
            raise CalibrationError(
                f"{name} runs in another order than in the first batch, or more than once, so the model cannot be run "
                f"block by block; {WHOLE}"
            )
        if block and hidden is not self._last:
            raise CalibrationError(
                f"{name} does not run on the output of the block before it, so the model cannot be run block by "
                f"block; {WHOLE}"
            )
        self._last = None
        self.enter((chain, block), hidden, args, kwargs)
        self._inside = True
        self._dropping.enter_context(nothing_saved())

    def _leave(self, number: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        self._dropping.close()
        chain, block, name = self._steps[number]
        step, found = (chain, block), output_of(name, output)
        self._next, self._inside = number + 1, False
        self.leave(step, found)
        leaf = found.detach().requires_grad_(torch.is_grad_enabled())
        self._last = leaf.clone()  # not a leaf, so that models may change it in place
        if self._last.requires_grad:
            self._leaves.append((step, weakref.ref(leaf)))
            self._last.register_hook(partial(self.receive, step))  # type: ignore[no-untyped-call]
        return with_output(output, self._last)

    def _check_region(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.region != self._region_of[name]:
            raise CalibrationError(
                f"{name} runs between blocks, or elsewhere than in the first batch, so its gradient is not known block "
                f"by block; add it to ignore, or {WHOLE}"
            )


def nothing_saved() -> AbstractContextManager[None]:
    """Return a context in which a graph is built without the tensors that a backward pass needs."""
    return torch.autograd.graph.saved_tensors_hooks(_dropped, _refused)


def _dropped(tensor: Tensor) -> Any:
    """Keep nothing of a tensor."""


def _refused(nothing: Any) -> Tensor:
    raise CalibrationError(
        f"the loss depends on the inside of a block other than through its output, so the model cannot be run block by "
        f"block; {WHOLE}"
    )


def reached_from(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the leaves of the graph on which tensors depend."""
    found: list[Tensor] = [tensor for tensor in tensors if tensor.grad_fn is None and tensor.requires_grad]
    left: list[Any] = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen = set(left)
    while left:
        node = left.pop()
        if (variable := getattr(node, "variable", None)) is not None:
            found.append(variable)
        new = [following for following, _ in node.next_functions if following is not None and following not in seen]
        seen.update(new)
        left += new
    return found
