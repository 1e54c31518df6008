"""Dead leaves: random images with the statistics of photographs, where a refinement may start.

Shapes of all sizes lie on each other and hide what is below (Matheron 1968; Lee, Mumford, Huang, "Occlusion Models for
Natural Images", IJCV 2001). With radii r of density proportional to r^-3 the images look alike at every scale, and edges,
areas and the spectrum of about 1 / f come out as in photographs; networks trained on such images learn features that serve
for real ones (Baradad et al., "Learning to See by Looking at Noise", 2021, arXiv 2106.05963). They cost no pass through any
network.

A leaf here is an ellipse or a rounded rectangle of one colour, shaded along its length, some with a texture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from inc_clusterq.synthesis.spectrum import wave_weights

# Our choice, all of it; none was tuned.
LEAVES = 250
SMALLEST, LARGEST = 0.02, 0.5  # radii as shares of the image
GROUND, GROUND_SMALLEST = 8, 0.3  # the first leaves are large, so that they cover the ground
COLOUR = 0.12  # deviation of a channel from the leaf's grey
SHADE = 0.15  # deviation of the change of brightness from the middle of a leaf to its end
TEXTURE, TEXTURE_SLOPE = 0.06, 0.8
ELLIPSE, RECTANGLE = 2.0, 8.0  # exponents p of |a|^p + |b|^p < 1
CORNER = math.sqrt(2)  # no point of a leaf is further from its middle, in radii
EPSILON = 1e-6  # deviation of what has none, an image of one pixel


def dead_leaves(shape: tuple[int, ...], samples: int, rng: torch.Generator) -> Tensor:
    """Images (samples, C, H, W) of shares of the value range, 0 to 1."""
    channels, height, width = shape
    images, rough = torch.zeros(samples, *shape), torch.zeros(samples, 1, height, width)
    for number in range(LEAVES):
        for leaf, image, roughness in zip(_leaves(number < GROUND, channels, samples, rng), images, rough, strict=True):
            leaf.paint(image, roughness)
    return (images + TEXTURE * rough * _texture((samples, 1, height, width), rng)).clamp(0, 1)


@dataclass(frozen=True)
class _Leaf:
    """One leaf in one image: each a number, of shape (1, 1) or with channels (C, 1, 1)."""

    down: Tensor  # of its middle, a share of the image, as are all lengths
    right: Tensor
    angle: Tensor
    radius: Tensor
    narrow: Tensor  # the other radius as a share of the radius
    power: Tensor
    colour: Tensor  # (C, 1, 1)
    shade: Tensor
    rough: Tensor

    def paint(self, image: Tensor, rough: Tensor) -> None:
        """Cover a part of an image (C, H, W), and of the amplitudes of its texture (1, H, W), in place."""
        height, width = image.shape[1:]
        top, bottom = self._reached(self.down, height)
        left, end = self._reached(self.right, width)
        down = (torch.arange(top, bottom)[:, None] + 0.5) / height - self.down
        right = (torch.arange(left, end)[None] + 0.5) / width - self.right
        along = (right * self.angle.cos() + down * self.angle.sin()) / self.radius
        across = (down * self.angle.cos() - right * self.angle.sin()) / (self.radius * self.narrow)
        covered = (along.abs() ** self.power + across.abs() ** self.power) < 1
        image, rough = image[:, top:bottom, left:end], rough[:, top:bottom, left:end]
        image.copy_(torch.where(covered, self.colour + self.shade * along.clamp(-1, 1), image))
        rough.copy_(torch.where(covered, self.rough, rough))

    def _reached(self, middle: Tensor, size: int) -> tuple[int, int]:
        """The pixels of an axis that it may cover, whichever way it lies: the first, and the one behind the last."""
        centre, reach = float(middle) * size - 0.5, CORNER * float(self.radius) * size
        return max(math.floor(centre - reach), 0), min(math.ceil(centre + reach) + 1, size)


def _leaves(ground: bool, channels: int, samples: int, rng: torch.Generator) -> Iterator[_Leaf]:
    """The next leaf of every image."""

    def draw(*more: int) -> Tensor:
        return torch.rand(samples, *more, 1, 1, generator=rng)

    radius = (SMALLEST**-2 - draw() * (SMALLEST**-2 - LARGEST**-2)) ** -0.5
    if ground:
        radius = radius.clamp_min(GROUND_SMALLEST)
    down, right, angle, narrow = draw(), draw(), draw() * math.pi, 0.4 + 0.6 * draw()
    power = torch.where(draw() < 0.5, ELLIPSE, RECTANGLE)
    colour = draw(1) + COLOUR * torch.randn(samples, channels, 1, 1, generator=rng)
    shade = SHADE * torch.randn(samples, 1, 1, generator=rng)
    return map(_Leaf, down, right, angle, radius, narrow, power, colour, shade, 2 * draw().square())


def _texture(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Noise whose amplitudes fall with frequency, deviation 1 in each image."""
    space = shape[2:]
    noise = torch.fft.rfftn(torch.randn(shape, generator=rng), dim=(2, 3)) * wave_weights(space, TEXTURE_SLOPE)
    texture: Tensor = torch.fft.irfftn(noise, space, dim=(2, 3))
    texture -= texture.mean((2, 3), keepdim=True)
    return texture / texture.std((2, 3), correction=0, keepdim=True).clamp_min(EPSILON)
