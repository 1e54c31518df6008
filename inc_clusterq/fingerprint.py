"""What tells one network from another: what was made for a network is used for those with its fingerprint alone.

Parameters and buffers do not tell what the code does with them, so what two inputs bring about counts as well: mean and size of
every module's output. They are rounded, since two machines differ in the last digits.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from inc_clusterq.checksum import checksum
from inc_clusterq.inputs import InputSpec
from inc_clusterq.modes import evaluated

RESOLUTION = 0.01  # of a mean, in units of the root mean square, and of the logarithm of that


def fingerprint(module: nn.Module, spec: InputSpec) -> str:
    """SHA-256 (hex) of structure, parameters, buffers and rounded outputs: equal for networks that compute the same."""
    digest = hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", repr(module)).encode())
    tensors = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    digest.update(checksum(dict(tensors)).encode())
    with torch.random.fork_rng(), torch.no_grad(), evaluated(module), _noted(module) as noted:
        torch.manual_seed(0)  # some networks draw random numbers in eval mode too
        module(ramp(module, spec))
    digest.update(" ".join(noted).encode())
    return digest.hexdigest()


def ramp(module: nn.Module, spec: InputSpec) -> Tensor:
    """Two inputs that go through the whole value range, shape (2, *shape), where the module lies and of its dtype."""
    like = next((value for value in module.parameters()), torch.empty(0))
    low, high = spec.bounds(like)
    shares = torch.linspace(0, 1, 2 * math.prod(spec.shape), dtype=like.dtype, device=like.device)
    return low + (high - low) * shares.view(2, *spec.shape)


@contextmanager
def _noted(module: nn.Module) -> Iterator[list[str]]:
    """What every module returns while the context is open, in order, in two rounded numbers each."""
    noted: list[str] = []

    def note(part: nn.Module, args: Any, output: Any) -> None:
        noted.extend(_rounded(leaf) for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point())

    handles = [part.register_forward_hook(note) for part in module.modules()]
    try:
        yield noted
    finally:
        for handle in handles:
            handle.remove()


def _rounded(output: Tensor) -> str:
    values = output.detach().double()
    size = float(values.square().mean().sqrt()) if values.numel() else 0.0
    if not (0 < size < math.inf):
        return str(size)
    return f"{round(float(values.mean()) / size / RESOLUTION)},{round(math.log(size) / RESOLUTION)}"
