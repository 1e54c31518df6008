"""Modes and buffers of a user's modules, lent and given back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parameter import is_lazy


@contextmanager
def evaluated(module: nn.Module) -> Iterator[None]:
    """Eval mode inside; every submodule's own mode afterwards, and buffers as they were, such as a model's count of calls."""
    modes = [(part, part.training) for part in module.modules()]
    buffers = [
        (part, name, buffer, buffer.clone())
        for part in module.modules()
        for name, buffer in part.named_buffers(recurse=False)
        if not is_lazy(buffer)
    ]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
        with torch.no_grad():
            for part, name, buffer, before in buffers:
                if getattr(part, name, None) is not buffer:
                    setattr(part, name, buffer)
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
