"""Dead leaves: random images with the statistics of photographs, where a refinement may start.

Shapes of all sizes lie on each other and hide what is below (Matheron 1968; Lee, Mumford, Huang, "Occlusion Models for
Natural Images", IJCV 2001). With radii r of density proportional to r^-3 the images look alike at every scale, and edges,
areas and the spectrum of about 1 / f come out as in photographs; networks trained on such images learn features that serve
for real ones (Baradad et al., "Learning to See by Looking at Noise", 2021, arXiv 2106.05963). They cost no pass through any
network.

A leaf here is an ellipse or a rounded rectangle of one colour, shaded along its length, some with a texture.

Photographs are not alike: some are dark, some flat, some plain and some busy, and a layer of a network meets with them a wide
range of means and contrasts. BatchNorm's statistics are those of all images together and ask for none of that. So every image
here has leaves down to a size of its own, and a light of its own: contrast, brightness and cast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from inc_clusterq.synthesis.spectrum import wave_weights

# Our choice, all of it; of a leaf nothing was tuned, of what differs between images two amounts were tried.
LEAVES = 250
SMALLEST, LARGEST = 0.02, 0.5  # radii as shares of the image; the smallest in an image is anything between
GROUND, GROUND_SMALLEST = 8, 0.3  # the first leaves are large, so that they cover the ground
COLOUR = 0.12  # deviation of a channel from the leaf's grey
SHADE = 0.15  # deviation of the change of brightness from the middle of a leaf to its end
TEXTURE, TEXTURE_SLOPE = 0.06, 0.8
CORNER = math.sqrt(2)  # no point of a leaf is further from its middle, in radii
CONTRAST, CONTRASTS = 0.75, 0.4  # of an image, as a factor: its median, and the deviation of its logarithm
LEAST_CONTRAST, MOST_CONTRAST = 0.15, 1.2
BRIGHTNESS, CAST = 0.12, 0.08  # deviations of what is added to all of an image, and to each of its channels
PAINTED_WHOLE = 64 * 64  # pixels up to which all images are painted at once; in larger ones, each where its leaf lies
EPSILON = 1e-6  # deviation of what has none, an image of one pixel


def dead_leaves(shape: tuple[int, ...], samples: int, rng: torch.Generator) -> Tensor:
    """Images (samples, C, H, W) of shares of the value range, 0 to 1."""
    channels, height, width = shape
    images, rough = torch.zeros(samples, *shape), torch.zeros(samples, height, width)
    smallest = SMALLEST * (LARGEST / SMALLEST) ** torch.rand(samples, 1, 1, generator=rng)
    for number in range(LEAVES):
        leaves = _next(number < GROUND, channels, smallest, rng)
        if height * width <= PAINTED_WHOLE:
            leaves.paint(images, rough)
            continue
        for image in range(samples):
            leaves.of(image).paint(images[image : image + 1], rough[image : image + 1])
    return _lit(images + TEXTURE * rough[:, None] * _texture((samples, 1, height, width), rng), rng).clamp(0, 1)


@dataclass(frozen=True)
class _Leaves:
    """One leaf in each of some images: numbers of shape (N, 1, 1)."""

    down: Tensor  # of its middle, a share of the image, as are all lengths
    right: Tensor
    angle: Tensor
    radius: Tensor
    narrow: Tensor  # the other radius as a share of the radius
    is_round: Tensor  # whether it is an ellipse, |a|^2 + |b|^2 < 1, and not a rounded rectangle, |a|^8 + |b|^8 < 1
    colour: Tensor  # (N, C, 1, 1)
    shade: Tensor
    rough: Tensor

    def of(self, image: int) -> _Leaves:
        """The leaf of one image alone."""
        return _Leaves(*[getattr(self, field.name)[image : image + 1] for field in fields(self)])

    def paint(self, images: Tensor, rough: Tensor) -> None:
        """Cover a part of each image (N, C, H, W), and of the amplitudes of its texture (N, H, W), in place."""
        height, width = rough.shape[1:]
        (top, bottom), (left, end) = (0, height), (0, width)
        if len(images) == 1:
            top, bottom = self._reached(self.down, height)
            left, end = self._reached(self.right, width)
        down = (torch.arange(top, bottom)[:, None] + 0.5) / height - self.down
        right = (torch.arange(left, end)[None] + 0.5) / width - self.right
        along = (right * self.angle.cos() + down * self.angle.sin()) / self.radius
        across = (down * self.angle.cos() - right * self.angle.sin()) / (self.radius * self.narrow)
        covered = self._powers(along) + self._powers(across) < 1
        images, rough = images[:, :, top:bottom, left:end], rough[:, top:bottom, left:end]
        shaded = self.colour + (self.shade * along.clamp(-1, 1))[:, None]
        images.copy_(torch.where(covered[:, None], shaded, images))
        rough.copy_(torch.where(covered, self.rough, rough))

    def _powers(self, lengths: Tensor) -> Tensor:
        squares = lengths.square()
        return torch.where(self.is_round, squares, squares.square().square())

    def _reached(self, middle: Tensor, size: int) -> tuple[int, int]:
        """The pixels of an axis that the leaf of one image may cover, whichever way it lies: first, and one behind the last."""
        centre, reach = float(middle) * size - 0.5, CORNER * float(self.radius) * size
        return max(math.floor(centre - reach), 0), min(math.ceil(centre + reach) + 1, size)


def _next(ground: bool, channels: int, smallest: Tensor, rng: torch.Generator) -> _Leaves:
    """The next leaf of every image, whose `smallest` radii have the shape (samples, 1, 1)."""
    samples = len(smallest)

    def draw(*more: int) -> Tensor:
        return torch.rand(samples, *more, 1, 1, generator=rng)

    radius = (smallest**-2 - draw() * (smallest**-2 - LARGEST**-2)) ** -0.5
    if ground:
        radius = radius.clamp_min(GROUND_SMALLEST)
    down, right, angle, narrow = draw(), draw(), draw() * math.pi, 0.4 + 0.6 * draw()
    is_round = draw() < 0.5
    colour = draw(1) + COLOUR * torch.randn(samples, channels, 1, 1, generator=rng)
    shade = SHADE * torch.randn(samples, 1, 1, generator=rng)
    return _Leaves(down, right, angle, radius, narrow, is_round, colour, shade, 2 * draw().square())


def _lit(images: Tensor, rng: torch.Generator) -> Tensor:
    """Every image (C, H, W) in a light of its own; what leaves the range by that is not yet clipped."""

    def draw(channels: int) -> Tensor:
        return torch.randn(len(images), channels, 1, 1, generator=rng)

    middle = images.mean((1, 2, 3), keepdim=True)
    contrast = (CONTRAST * (CONTRASTS * draw(1)).exp()).clamp(LEAST_CONTRAST, MOST_CONTRAST)
    return middle + contrast * (images - middle) + BRIGHTNESS * draw(1) + CAST * draw(images.shape[1])


def _texture(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Noise whose amplitudes fall with frequency, deviation 1 in each image."""
    space = shape[2:]
    noise = torch.fft.rfftn(torch.randn(shape, generator=rng), dim=(2, 3)) * wave_weights(space, TEXTURE_SLOPE)
    texture: Tensor = torch.fft.irfftn(noise, space, dim=(2, 3))
    texture -= texture.mean((2, 3), keepdim=True)
    return texture / texture.std((2, 3), correction=0, keepdim=True).clamp_min(EPSILON)
