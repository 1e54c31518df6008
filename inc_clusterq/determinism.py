"""One seed, one result: what that takes on a GPU, where kernels are otherwise picked by timing and round to 10 bits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

CUBLAS = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # one of the two values with which cuBLAS promises the same numbers

deterministic: Any = torch.utils.deterministic  # a module with a property


@contextmanager
def repeatable() -> Iterator[None]:
    """Inside, a GPU computes the same numbers each time, in float32 throughout; a CPU is left as it is.

    Of an operator that PyTorch has no such kernel for, it warns.
    """
    with (
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
        _deterministic_kernels(),
    ):
        yield


@contextmanager
def _deterministic_kernels() -> Iterator[None]:
    """Sums in a fixed order, where there is a GPU."""
    if not torch.cuda.is_available():
        yield
        return
    os.environ.setdefault(*CUBLAS)
    mode, fills = torch.get_deterministic_debug_mode(), deterministic.fill_uninitialized_memory
    try:
        torch.set_deterministic_debug_mode("warn")
        deterministic.fill_uninitialized_memory = False  # a launch for every tensor, of what nothing here reads
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        deterministic.fill_uninitialized_memory = fills
