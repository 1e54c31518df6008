"""How maps lie in memory while a network is reconstructed: on a CPU with the channels last.

Convolutions are computed so in any case, and the gradient of a depthwise one's weights is taken two to three times as fast.
What goes through a unit element by element keeps the order of what came in, so that it is enough to lay the inputs out.
"""

from __future__ import annotations

import torch
from torch import Tensor

LAST = torch.channels_last
MAPS = 4  # axes of a batch of them


def laid_out(x: Tensor) -> Tensor:
    """The same values, maps (N, C, H, W) on a CPU with channels last."""
    return x.contiguous(memory_format=LAST) if x.dim() == MAPS and x.device.type == "cpu" else x


def has_channels_last(x: Tensor) -> bool:
    """Whether maps lie so, and not the usual way, which of a single channel or pixel is the same."""
    return x.dim() == MAPS and x.is_contiguous(memory_format=LAST) and not x.is_contiguous()


def shaped(flat: Tensor, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A view of as many values in the order in which those of `like` lie, which has the same axes."""
    if not has_channels_last(like):
        return flat.view(shape)
    images, channels, height, width = shape
    return flat.view(images, height, width, channels).permute(0, 3, 1, 2)


def in_order(x: Tensor) -> Tensor:
    """All values in the order in which they lie, without a copy where they lie in one of the two ways."""
    return (x.permute(0, 2, 3, 1) if has_channels_last(x) else x).reshape(-1)


def rows(x: Tensor, chosen: Tensor) -> Tensor:
    """Images of a tensor by their numbers, laid out as it is."""
    if not has_channels_last(x):
        return x.index_select(0, chosen)
    return x.permute(0, 2, 3, 1).index_select(0, chosen).permute(0, 3, 1, 2)
