"""Random shifts and flips between an image and the model, so that it is not tuned to single pixels of the first layer.

As in DeepInversion (arXiv 1912.08795): the batch is rolled by up to an eighth of its size, one flip per sample. Only
images, shape (C, H, W), have directions in which that is harmless; other inputs pass unchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inc_clusterq.synthesis.settings import Augmentation

SHIFT = 8  # the largest shift is 1/8 of the size, as in ImageNet runs of DeepInversion (30 of 224 pixels)


def augment(x: Tensor, kind: Augmentation, rng: torch.Generator) -> Tensor:
    """A differentiable random version of the batch `x`, (N, C, H, W); any other shape comes back as it is."""
    if x.dim() != 4 or kind == "none":
        return x
    shifts = [int(torch.randint(-(size // SHIFT), size // SHIFT + 1, (), generator=rng)) for size in x.shape[2:]]
    x = torch.roll(x, shifts, (2, 3))
    if kind == "shift_flip":
        flipped = torch.rand(x.shape[0], generator=rng) < 0.5
        x = torch.where(flipped.to(x.device).view(-1, 1, 1, 1), x.flip(3), x)
    return x
