"""Mixtures of images to learn from: two of them, one shining through the other (mixup, arXiv 1710.09412).

What is synthesised has means and variances as in the training data, and other correlations between channels and between
neighbours. A unit that learns from such inputs alone learns to rely on them. A mixture of two inputs is one that neither of
them was made for, and the float network says what should come out; in hidden layers as for images (arXiv 1806.05236). For the
same reason the weights of the start adapt to such inputs less (`second_order.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inc_clusterq.inputs import is_large
from inc_clusterq.reconstruction.settings import ReconstructionSettings

ENOUGH_BITS = 8  # of activations: nothing is gained by mixtures then


@dataclass(frozen=True)
class Mixture:
    """How each of the images of a step is mixed with another one of them."""

    share: Tensor  # of the image itself, 0 to 1, shape: (N,)
    other: Tensor  # number of the other one, shape: (N,)

    @classmethod
    def draw(cls, count: int, generator: torch.Generator) -> Mixture:
        """Shares are uniform, and each image is the other one of one image."""
        device = generator.device
        share = torch.rand(count, generator=generator, device=device)
        return cls(share, torch.randperm(count, generator=generator, device=device))

    def of(self, images: Tensor) -> Tensor:
        """The mixtures of images, or of anything of theirs, (N, ...)."""
        return images[self.other].lerp(images, self.share.to(images.dtype).view(-1, *[1] * (images.dim() - 1)))


def without_data(settings: ReconstructionSettings, shape: Sequence[int], activation_bits: int) -> ReconstructionSettings:
    """The settings for synthetic images, each of this shape, where they leave `mixtures` open; see there."""
    if settings.mixtures is not None:
        return settings
    return settings.model_copy(update={"mixtures": is_large(shape) and activation_bits < ENOUGH_BITS})
