"""SHA-256 over tensors: their names, types, shapes and values."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hashlib import _Hash


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """The digest (hex) of tensors of any type, whatever their order."""
    digest = hashlib.sha256()
    update(digest, sorted(tensors.items()))
    return digest.hexdigest()


def update(digest: _Hash, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Take tensors into a digest, in the order given."""
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(content(tensor))


def content(tensor: Tensor) -> memoryview:
    """A tensor's bytes, without a copy where it lies on the CPU in one piece."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
