"""Random shifts and flips between an image and the model, so that it is not tuned to single pixels of the first layer.

As in DeepInversion (arXiv 1912.08795): the batch is rolled by up to an eighth of its size, one flip per sample. Only
images, shape (C, H, W), have directions in which that is harmless; other inputs pass unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from inc_clusterq.synthesis.settings import Augmentation

SHIFT = 8  # the largest shift is 1/8 of the size, as in ImageNet runs of DeepInversion (30 of 224 pixels)


def augment(x: Tensor, kind: Augmentation, rng: torch.Generator) -> Tensor:
    """A differentiable random version of the batch `x`, (N, C, H, W); any other shape comes back as it is."""
    if x.dim() != 4 or kind == "none":
        return x
    shifts = [int(torch.randint(-(size // SHIFT), size // SHIFT + 1, (), generator=rng)) for size in x.shape[2:]]
    flipped = torch.rand(x.shape[0], generator=rng) < 0.5 if kind == "shift_flip" else torch.zeros(x.shape[0], dtype=torch.bool)
    moved: Tensor = _Moved.apply(x, shifts, flipped.nonzero().flatten().tolist())
    return moved


class _Moved(torch.autograd.Function):
    """Rolled, then some samples flipped left to right: a permutation, whose derivative is its inverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shifts: list[int], flipped: list[int]) -> Tensor:
        ctx.shifts, ctx.flipped = shifts, flipped
        return _flip(torch.roll(x, shifts, (2, 3)), flipped)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        upright = _flip(grad.clone(), ctx.flipped)
        return torch.roll(upright, [-shift for shift in ctx.shifts], (2, 3)), None, None


def _flip(x: Tensor, samples: list[int]) -> Tensor:
    """Flip some samples in place, one by one: a mask would move all of them several times."""
    for sample in samples:
        x[sample] = x[sample].flip(2)
    return x
