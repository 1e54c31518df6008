"""More of each calibration image: the same thing a few pixels aside, and mirrored.

Strides and pooling cut a shifted image elsewhere, so that its maps are new samples of the same distribution. For a network
without data that is what is scarce: an image costs its synthesis, a view of it a forward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from inc_clusterq.inputs import is_large
from inc_clusterq.reconstruction.settings import ENOUGH_IMAGES, MOST_VIEWS, SMALLEST_VIEWED, ReconstructionSettings

REACH = 10  # a shift is at most a side divided by this
PICTURE_CHANNELS = 3  # what has as many is a picture, which may be mirrored


def count_views(images: Tensor, settings: ReconstructionSettings) -> int:
    """How many views each of the images (N, *shape) gets, itself included.

    Large images have many positions; what views of them gained could not be told from noise.
    """
    if images.dim() != 4 or min(images.shape[2:]) < SMALLEST_VIEWED:
        return 1
    if settings.views is not None:
        return settings.views
    return 1 if is_large(images.shape[1:]) else min(MOST_VIEWS, max(1, ENOUGH_IMAGES // len(images)))


def with_views(images: Tensor, count: int, generator: torch.Generator, *, mirror: bool = True) -> Tensor:
    """The images (N, C, H, W) and `count` - 1 views of each, as (count * N, C, H, W): view v of image i is number v * N + i.

    With `count` 1 the images themselves, whatever their shape.

    With `mirror` odd views of pictures are mirrored left to right; all but the images themselves are shifted by up to a tenth
    of each side, and what comes in at the border is reflected.
    """
    if count == 1:
        return images
    views = [images]
    for number in range(1, count):
        mirrored = mirror and number % 2 == 1 and images.shape[1] == PICTURE_CHANNELS
        views.append(_shifted(images.flip(3) if mirrored else images, generator))
    return torch.cat(views)


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    height, width = images.shape[2:]
    down, right = height // REACH, width // REACH
    padded = pad(images, (right, right, down, down), mode="reflect")
    tops = torch.randint(2 * down + 1, (len(images),), generator=generator).tolist()
    lefts = torch.randint(2 * right + 1, (len(images),), generator=generator).tolist()
    places = zip(padded, tops, lefts, strict=True)
    return torch.stack([image[:, top : top + height, left : left + width] for image, top, left in places])
