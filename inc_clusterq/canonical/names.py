"""Names for attributes that are added to a graph's modules."""

from __future__ import annotations

from torch import nn


def unused_name(module: nn.Module, name: str) -> str:
    """`name`, with as many underscores behind it as keep it from being an attribute that `module` has."""
    while hasattr(module, name):
        name += "_"
    return name
