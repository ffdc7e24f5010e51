"""Output projection of an attention layer, through which values reach its output, found by what it does.

The projection is the first linear module inside of the attention layer that is called with the attention's result. It
is read by running it, so that its form (dense, low-rank, with an adapter, quantized) does not matter. Hooks of users do
not run then: they see each batch once.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from zssvd_lightning._contexts import overridden
from zssvd_lightning._numerics import in_float64

FORWARD = ("_forward_pre_hooks", "_forward_hooks")
"""Attributes in which modules hold hooks around their forward pass."""

NEARLY = 2e-2
"""Largest relative deviation from linearity of a linear map in bfloat16."""


class Waiting(NamedTuple):
    """An attention layer whose output projection is called next."""

    attention: nn.Module
    width: int
    """Width of the attention's result: all heads beside each other."""
    heads: int
    """Number H of cached heads."""
    value_width: int
    """Width d of a value."""
    found: Callable[[Tensor], None]
    """Function that takes `sum_h W_h W_h^T` (H, d, d)."""


class OutputProjections:
    """Global forward pre-hook that finds output projections. Use as a context."""

    def __init__(self) -> None:
        self._waiting: Waiting | None = None

    def __enter__(self) -> Self:
        self._hook = nn.modules.module.register_module_forward_pre_hook(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()
        self._waiting = None

    def wait(self, waiting: Waiting) -> None:
        """Look for the output projection of a layer whose attention is computed now."""
        self._waiting = waiting

    def _called(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        waiting = self._waiting
        if waiting is None or not args or not isinstance(args[0], Tensor) or args[0].shape[-1] != waiting.width:
            return
        if all(module is not part for part in waiting.attention.modules()):
            return
        self._waiting = None
        example = args[0].detach().reshape(-1, waiting.width)[:4]
        with _without_hooks(module):
            if is_linear(module, example):
                waiting.found(squares_of(module, example, waiting.heads, waiting.value_width))
            else:
                self._waiting = waiting


@contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """Let a module and its parts run without hooks within the context, but for those of torch, which compute weights.

    Global hooks do not run either.
    """
    with ExitStack() as stack:
        stack.enter_context(overridden(nn.modules.module, **{f"_global{kind}": OrderedDict() for kind in FORWARD}))
        for part in module.modules():
            hooks = {kind: OrderedDict(filter(_is_of_torch, vars(part)[kind].items())) for kind in FORWARD}
            stack.enter_context(overridden(part, **hooks))
        yield


def _is_of_torch(entry: tuple[int, Any]) -> bool:
    """Return whether a registered hook belongs to torch, such as that of `torch.nn.utils.weight_norm`."""
    hook = entry[1]
    return type(getattr(hook, "__self__", hook)).__module__.startswith("torch.")


@torch.no_grad()
def is_linear(module: nn.Module, X: Tensor) -> bool:
    """Return True if a module maps inputs X (N, n) linearly, up to a constant."""
    constant = module(torch.zeros_like(X))
    once, twice = module(X), module(2 * X)
    if not isinstance(once, Tensor) or once.shape[:-1] != X.shape[:-1]:
        return False
    error = (twice - constant) - 2 * (once - constant)
    return bool(error.norm() <= NEARLY * (once - constant).norm())


@torch.no_grad()
def squares_of(module: nn.Module, like: Tensor, heads: int, width: int) -> Tensor:
    """Return `sum_h W_h W_h^T` (H, d, d) over the query heads of each cached head, for a linear module.

    Args:
        module: output projection.
        like: inputs (N, n), for the type and the width n of all query heads together.
        heads: number H of cached heads. The query heads of one follow each other in the input.
        width: width d of a value.
    """
    n = like.shape[-1]
    constant = module(like.new_zeros(1, n))
    found = []
    for rows in torch.eye(n, dtype=like.dtype, device=like.device).chunk(heads):
        W = in_float64(module(rows) - constant)  # (G d, m): one cached head at a time
        W = W.view(-1, width, W.shape[-1])
        found.append((W @ W.mT).sum(0))
    return torch.stack(found)
