"""How maps lie in memory where networks are run many times over: on a CPU with the channels last.

benchmarks/teacher.py and benchmarks/whole_step.py tell what that saves. Most operators keep the order of what comes in, so
that it is enough to lay the inputs out; behind one that does not, such as a reshape, maps lie the usual way and are computed
as well, if slower.
"""

from __future__ import annotations

import torch
from torch import Tensor

LAST = torch.channels_last
MAPS = 4  # axes of a batch of them


def laid_out(x: Tensor) -> Tensor:
    """The same values, maps (N, C, H, W) on a CPU with channels last, all else the usual way."""
    return x.contiguous(memory_format=LAST) if x.dim() == MAPS and x.device.type == "cpu" else x.contiguous()


def has_channels_last(x: Tensor) -> bool:
    """Whether maps lie so; False where both orders are one, of a single channel or a single pixel."""
    return x.dim() == MAPS and x.is_contiguous(memory_format=LAST) and not x.is_contiguous()


def shaped(flat: Tensor, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A view of as many values in the order in which those of `like` lie, where that has as many axes."""
    if not has_channels_last(like):
        return flat.view(shape)
    images, channels, height, width = shape
    return flat.view(images, height, width, channels).permute(0, 3, 1, 2)


def in_order(x: Tensor) -> Tensor:
    """All values in the order in which they lie, without a copy where they lie in one of the two ways."""
    return (x.permute(0, 2, 3, 1) if has_channels_last(x) else x).reshape(-1)


def images_of(x: Tensor, numbers: Tensor) -> Tensor:
    """Images of a tensor by their numbers, in the order in memory that it has."""
    if not has_channels_last(x):
        return x.index_select(0, numbers)
    return x.permute(0, 2, 3, 1).index_select(0, numbers).permute(0, 3, 1, 2)
