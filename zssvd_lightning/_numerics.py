"""Numerical precision: sums in float32 or wider, exact products and float64 decompositions."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

DTYPES = ("float32", "bfloat16", "float16", "float64")
"""Names of floating-point types that settings accept."""


SMALL_SQUARE = 256
"""Width up to which `add_square` computes `X^T X` as one product."""


SMALL_SQUARE_BFLOAT16 = 640
"""Same limit for bfloat16 inputs, whose products are faster."""


@contextmanager
def exact_products(of: torch.dtype = torch.float32) -> Iterator[None]:
    """Compute float32 products exactly within the context, regardless of `torch.set_float32_matmul_precision`.

    Args:
        of: original type of the numbers. For numbers that were bfloat16, bfloat16 hardware units lose nothing, sum in
            float32 and are faster, so they are allowed.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if of == torch.bfloat16 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether a device has instructions that multiply bfloat16. Without them, it takes longer than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    found = torch._C._cpu  # noqa: SLF001  torch.cpu tells it in some releases only
    if hasattr(found, "_get_cpu_capability"):
        has = found._get_cpu_capability()  # noqa: SLF001
        return any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(hasattr(found, name) and bool(getattr(found, name)()) for name in tests)


def accumulated(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which to sum numbers of `dtype`: float32 or wider."""
    return torch.promote_types(dtype, torch.float32)


def add_square(total: Tensor, X: Tensor, weight: float = 1.0) -> None:
    """Add `weight * X^T X` for X (T, n) to the symmetric `total` (n, n), with little more than half the operations.

    The columns of X are split into halves. The diagonal blocks are computed recursively and one off-diagonal block
    directly; the other is its transpose.
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
    """Return M in float64, on the CPU if the device (MPS) has no float64."""
    return (M.cpu() if M.device.type == "mps" else M).double()
