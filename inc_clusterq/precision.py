"""Numbers are float32 here, whatever dtype a user's own code has made the default, as code with 64-bit models does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def default_dtype_kept() -> Iterator[None]:
    """Whatever is set inside, torch's default dtype is afterwards what it was."""
    before = torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def float32_by_default() -> Iterator[None]:
    """New tensors are float32 inside; also a decorator."""
    with default_dtype_kept():
        torch.set_default_dtype(torch.float32)
        yield
