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
EPSILON = 1e-6  # deviation of what has none, an image of one pixel


def dead_leaves(shape: tuple[int, ...], samples: int, rng: torch.Generator) -> Tensor:
    """Images (samples, C, H, W) of shares of the value range, 0 to 1."""
    channels, height, width = shape
    rows, columns = (torch.arange(height)[:, None] + 0.5) / height, (torch.arange(width)[None] + 0.5) / width

    def draw(*more: int) -> Tensor:
        return torch.rand(samples, *more, 1, 1, generator=rng)

    images, rough = torch.zeros(samples, *shape), torch.zeros(samples, 1, height, width)
    for number in range(LEAVES):
        radius = (SMALLEST**-2 - draw() * (SMALLEST**-2 - LARGEST**-2)) ** -0.5
        if number < GROUND:
            radius = radius.clamp_min(GROUND_SMALLEST)
        down, right, angle = rows - draw(), columns - draw(), draw() * math.pi
        along = (right * angle.cos() + down * angle.sin()) / radius
        across = (down * angle.cos() - right * angle.sin()) / (radius * (0.4 + 0.6 * draw()))
        power = torch.where(draw() < 0.5, ELLIPSE, RECTANGLE)
        covered = ((along.abs() ** power + across.abs() ** power) < 1)[:, None]
        colour = draw(1) + COLOUR * torch.randn(samples, channels, 1, 1, generator=rng)
        shade = SHADE * torch.randn(samples, 1, 1, 1, generator=rng) * along[:, None].clamp(-1, 1)
        images = torch.where(covered, colour + shade, images)
        rough = torch.where(covered, 2 * draw(1).square(), rough)
    return (images + TEXTURE * rough * _texture((samples, 1, height, width), rng)).clamp(0, 1)


def _texture(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Noise whose amplitudes fall with frequency, deviation 1 in each image."""
    space = shape[2:]
    noise = torch.fft.rfftn(torch.randn(shape, generator=rng), dim=(2, 3)) * wave_weights(space, TEXTURE_SLOPE)
    texture: Tensor = torch.fft.irfftn(noise, space, dim=(2, 3))
    texture -= texture.mean((2, 3), keepdim=True)
    return texture / texture.std((2, 3), correction=0, keepdim=True).clamp_min(EPSILON)
