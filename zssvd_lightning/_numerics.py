"""Accumulate in a type that is wide enough: float32 sums, exact products, float64 decompositions."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

DTYPES = ("float32", "bfloat16", "float16", "float64")


SMALL_SQUARE = 256
"""Width up to which a product of a matrix with itself is made at once."""


SMALL_SQUARE_BFLOAT16 = 640
"""The same of numbers that came in bfloat16, of which products are faster."""


@contextmanager
def exact_products(of: torch.dtype = torch.float32) -> Iterator[None]:
    """Keeps float32 products exact, whatever `torch.set_float32_matmul_precision` allows elsewhere.

    Args:
        of: the type that the numbers came in. Units that multiply bfloat16 lose nothing of numbers that were bfloat16,
            add up in float32 and are faster.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if of == torch.bfloat16 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def accumulated(dtype: torch.dtype) -> torch.dtype:
    """The type in which numbers of `dtype` are added up: float32 or wider."""
    return torch.promote_types(dtype, torch.float32)


def add_square(total: Tensor, X: Tensor, weight: float = 1.0) -> None:
    """Adds `weight X^T X` of X (T, n) to the symmetric `total` (n, n), in little more than half of its operations.

    Halves of X make the blocks on the diagonal, in the same way, and one of the two beside it; the other mirrors that.
    """
    small = SMALL_SQUARE_BFLOAT16 if X.dtype == torch.bfloat16 else SMALL_SQUARE
    with torch.autocast(X.device.type, enabled=False), exact_products(X.dtype):
        _add_square(total, X.to(total.dtype), weight, small)


def _add_square(total: Tensor, X: Tensor, weight: float, small: int) -> None:
    n = X.shape[1]
    if n <= small:
        total.addmm_(X.T, X, alpha=weight)
        return
    first, second = slice(n // 2), slice(n // 2, n)
    _add_square(total[first, first], X[:, first], weight, small)
    _add_square(total[second, second], X[:, second], weight, small)
    total[first, second].addmm_(X[:, first].T, X[:, second], alpha=weight)
    total[second, first] = total[first, second].T


def in_float64(M: Tensor) -> Tensor:
    """The same in float64; on the CPU where the device has none."""
    return (M.cpu() if M.device.type == "mps" else M).double()
