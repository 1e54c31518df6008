"""One seed, one result: what that takes on a GPU, where kernels are otherwise picked by timing and round to 10 bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def repeatable() -> Iterator[None]:
    """Inside, cuDNN computes the same numbers each time, in float32 throughout; a CPU is left as it is."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield
