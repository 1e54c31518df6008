"""Random masks for QDrop (arXiv 2203.05740): 1 where the quantization is dropped, 0 elsewhere.

One is drawn for every activation of every step, and on a CPU drawing one number per element costs more than the
convolutions. At QDrop's own probability of one half a random bit will do: 64-bit words are drawn and spread through a
table. Masks are floats and mixed by `torch.lerp`, which is exact at 0 and 1 and, unlike `torch.where`,
vectorised on a CPU.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from inc_clusterq.layout import shaped

WORD = 64  # bits per random number
CHUNK = 16  # bits per row of the table


def draw_mask(like: Tensor, probability: float, generator: torch.Generator | None) -> Tensor:
    """A mask of the shape, dtype, device and order of `like`; each element is 1 with `probability`, independently."""
    if probability != 0.5 or like.device.type != "cpu":
        chances = torch.rand(like.numel(), generator=generator, device=like.device)
        return shaped((chances < probability).to(like.dtype), like.shape, like)
    words = -(-like.numel() // WORD)
    bits = torch.randint(-(2**63), 2**63 - 1, (words,), generator=generator)
    rows = bits.view(torch.int16).to(torch.int32) + 2 ** (CHUNK - 1)
    return shaped(_table(like.dtype).index_select(0, rows).flatten()[: like.numel()], like.shape, like)


@cache
def _table(dtype: torch.dtype) -> Tensor:
    """Row i holds the bits of i."""
    return ((torch.arange(2**CHUNK)[:, None] >> torch.arange(CHUNK)) & 1).to(dtype)
