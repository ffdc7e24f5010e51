"""Roots of second moments that later rounds use again, so that each is computed once.

Corrections may keep the second moments of the first calibration, and with them the roots. A root is used again only if
the bits of its moment are the same, so that results are bit for bit those without this.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from zssvd_lightning.whitening.cholesky import Root

SHARE = 0.25
"""Largest share of the free memory of a device that roots take."""

UNKNOWN = 2**30
"""Bytes that count as free where the system does not tell."""

ROWS_AT_ONCE = 1024
"""Rows of a moment whose fingerprint is taken at once, which bounds the memory."""


class Kept(NamedTuple):
    """Root, and what it was computed from."""

    source: tuple[int, float, torch.Size]
    """Fingerprint of the sums, their count, and their shape."""
    root: Root


class KeptRoots:
    """Square roots of second moments by layer, as long as there is memory for them.

    Args:
        active: False to keep none, for second moments that are gathered anew for every round.

    Attributes:
        most: largest number of bytes of all roots; None for no limit but `SHARE`.
    """

    def __init__(self, active: bool = True) -> None:
        self.active = active
        self.most: int | None = None
        self.used = 0
        """Number of times that a root was used again."""
        self._kept: dict[str, Kept] = {}
        self.nbytes = 0
        """Bytes of all roots."""

    def root(self, key: str, sums: Tensor | None, count: float, dtype: torch.dtype, build: Callable[[], Root]) -> Root:
        """Return the root of a second moment: the one kept, or that of `build()`, which is then kept.

        Args:
            key: name of the layer and side.
            sums: sums (n, n) that the moment is computed from; None if there are none.
            count: number that the sums are divided by.
            dtype: type of the matrices that the root is multiplied with. The root is kept in it.
            build: function that computes the root, and raises what is wrong with the sums.
        """
        if not self.active or sums is None:
            return build()
        source = (fingerprint(sums), count, sums.shape)
        found = self._kept.get(key)
        if found is not None and found.source == source:
            self.used += 1
            return found.root
        if found is not None:
            self.nbytes -= _bytes_of(self._kept.pop(key))
        del found  # its memory is free before another root is built
        root = build()
        if root.S is not None and root.S.ndim == 2 and self._fits(root.S, dtype):
            self._kept[key] = Kept(source, replace(root, S=root.S.to(dtype)))
            self.nbytes += _bytes_of(self._kept[key])
        return root

    def clear(self) -> None:
        """Discard all roots."""
        self._kept.clear()
        self.nbytes = 0

    def _fits(self, S: Tensor, dtype: torch.dtype) -> bool:
        """Return whether a root may be kept, given the memory that is free and taken already."""
        own, taken = S.numel() * dtype.itemsize, self.nbytes
        within = self.most is None or taken + own <= self.most
        return within and taken + own <= SHARE * (free_bytes(S.device) + taken)


def _bytes_of(kept: Kept) -> int:
    return 0 if kept.root.S is None else kept.root.S.nbytes


def fingerprint(M: Tensor) -> int:
    """Return a number that another matrix (m, n), of which any bit differs, does not have but for a rare coincidence.

    It is a weighted sum of the bits of all numbers. The weights are odd, so that a change of one number always shows.
    """
    M = M.detach()
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[M.dtype.itemsize]
    high = torch.iinfo(words).max // 2
    generator = torch.Generator().manual_seed(0)
    by_row, by_column = (
        (2 * torch.randint(high, (size,), generator=generator, dtype=words) + 1).to(M.device) for size in M.shape
    )
    sums = []
    for part, weights in zip(torch.split(M, ROWS_AT_ONCE), torch.split(by_row, ROWS_AT_ONCE), strict=True):
        by_part = (part.contiguous().view(words) * by_column).sum(1, dtype=torch.int64)
        sums.append((by_part * weights).sum())
    return int(torch.stack(sums).sum())


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a device in bytes, or `UNKNOWN`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return UNKNOWN
