"""Memory given back to the system."""

import ctypes
import sys

import pytest

from zssvd_lightning._resources import resident_bytes, trim_heap

BLOCK, COUNT = 64 * 1024, 2_000
"""Bytes of a block, small enough that the C library takes it from its heap, and number of blocks (128 MB)."""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
def test_gaps_between_blocks_in_use_are_given_back() -> None:
    if getattr(ctypes.CDLL(None), "malloc_trim", None) is None:
        assert trim_heap() is False
        return
    blocks: list[bytearray | None] = [bytearray(b"x") * BLOCK for _ in range(COUNT)]
    blocks[::2] = [None] * (COUNT // 2)
    before = resident_bytes()
    trim_heap()
    after = resident_bytes()
    assert before is not None
    assert after is not None
    assert before - after > COUNT * BLOCK // 4
    assert all(block == b"x" * BLOCK for block in blocks[1::2])
