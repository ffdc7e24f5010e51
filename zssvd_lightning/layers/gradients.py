"""Operations of pivoted layers whose gradients are as cheap as themselves.

Each is the adjoint of another one: a permutation has the gradient of its inverse, `widened` that of `narrowed`, and
`narrowed` that of `widened`. They have gradients of all orders in reverse mode. Shapes: t tokens, widths k and l,
coefficients C (l, k). Imports only torch, so that a saved folder can contain a copy of this file.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def permuted(x: Tensor, order: Tensor) -> Tensor:
    """Return `x[..., order]`, for x (..., n) and a permutation `order` (n,) of 0 to n - 1, which is not checked.

    The gradient gathers by the inverse order. That of `index_select` sums into a tensor of zeros, because indices might
    be repeated, which takes several times as long on a CPU and atomic sums on a GPU.
    """
    if not torch.jit.is_scripting() and _needs_gradient(x):  # type: ignore[attr-defined]
        y: Tensor = _Permuted.apply(x, order)  # type: ignore[no-untyped-call]
        return y
    return x.index_select(-1, order)


def widened(z: Tensor, C: Tensor) -> Tensor:
    """Return `[z, z C^T]` (t, k + l), for z (t, k) and C (l, k), written into one tensor where `is_eager(z)`."""
    if _is_transformed(z):
        return torch.cat([z, z @ C.t()], 1)
    y: Tensor = _Widened.apply(z, C)  # type: ignore[no-untyped-call]
    return y


def narrowed(x: Tensor, C: Tensor) -> Tensor:
    """Return `x_1 + x_2 C^T` (t, k), for `x = [x_1, x_2]` (t, k + l) and C (k, l).

    Where `is_eager(x)` and gradients are enabled, that by x is written into one tensor.
    """
    if not torch.is_grad_enabled() or _is_transformed(x):
        return torch.addmm(x[:, : len(C)], x[:, len(C) :], C.t())
    z: Tensor = _Narrowed.apply(x, C)  # type: ignore[no-untyped-call]
    return z


def is_eager(x: Tensor) -> bool:
    """Return True if operations with x run as written, with reverse-mode gradients at most: no trace, no transform."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, nn.Parameter)
        and not x.is_meta
        and not torch.is_autocast_enabled(x.device.type)
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        and forward_ad._current_level < 0  # noqa: SLF001
        and not _is_transformed(x)
    )


@torch.jit.unused
def _needs_gradient(x: Tensor) -> bool:
    """Return True if x has a gradient in reverse mode alone, of the kind that `_Permuted` can give."""
    return (
        torch.is_grad_enabled()
        and x.requires_grad
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        and forward_ad._current_level < 0  # noqa: SLF001
        and (torch.compiler.is_compiling() or not _is_transformed(x))
    )


def _is_transformed(x: Tensor) -> bool:
    """Return True within `torch.func` and for batches of gradients, whose results cannot be written into a tensor."""
    functorch = torch._C._functorch  # noqa: SLF001
    return functorch.peek_interpreter_stack() is not None or functorch.is_legacy_batchedtensor(x)


class _Permuted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return x.index_select(-1, order)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return permuted(g, order.argsort()), None


class _Widened(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, C: Tensor) -> Tensor:
        ctx.save_for_backward(z, C)
        y = z.new_empty(len(z), z.shape[1] + len(C))
        y[:, : z.shape[1]] = z
        torch.mm(z, C.t(), out=y[:, z.shape[1] :])
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        z, C = ctx.saved_tensors
        by_z, by_C = ctx.needs_input_grad
        return narrowed(g, C.t()) if by_z else None, g[:, z.shape[1] :].t() @ z if by_C else None


class _Narrowed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, C: Tensor) -> Tensor:
        ctx.save_for_backward(x, C)
        return torch.addmm(x[:, : len(C)], x[:, len(C) :], C.t())

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, C = ctx.saved_tensors
        by_x, by_C = ctx.needs_input_grad
        return widened(g, C.t()) if by_x else None, g.t() @ x[:, len(C) :] if by_C else None
