"""Rows of a large tensor a few at a time, so that several elementwise passes over them find them in the cache.

A pass over a tensor that fits no cache costs as much as its memory traffic, and fresh memory for its result as much again;
done block by block, only the first read and the last write reach the memory. On a GPU the launches would cost more.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

BLOCK = 2**16  # elements: 256 kB in float32, so that a block and two results of it lie in 1 MB of second-level cache


def row_blocks(x: Tensor) -> Iterator[slice]:
    """Slices of the first axis of `x` that cover it once, in order."""
    rows = x.shape[0]
    most = max(1, BLOCK * rows // max(x.numel(), 1)) if x.device.type == "cpu" else max(rows, 1)
    for start in range(0, rows, most):
        yield slice(start, start + most)
