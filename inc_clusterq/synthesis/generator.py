"""Class-conditional generator of network inputs (ClusterQ, arXiv 2205.00179, after GDFQ, arXiv 2003.03603).

    h = z * Emb(y),  z ~ N(0, I);   h -> Linear -> start size ceil(size / 2^k) -> BatchNorm of class y
      -> k x [conv 3 -> BatchNorm -> LeakyReLU -> upsample 2, cropped to the next size] -> conv 3 -> tanh -> value range

Shapes with 1 to 3 spatial axes use the convolution of that dimension; a plain feature vector uses linear layers.

The first BatchNorm has a scale and shift per class, which the released code has in place of Emb for ImageNet. Emb alone
tells the class by the spread of h only, since z is symmetric: after 150 steps on ResNet-20 the teacher then recognises
19 % of the samples, with both 85 %. Other differences from the released code: any number of stages, convolution before
instead of after each upsampling (a quarter of the cost), and the value range of the sensor in place of a final BatchNorm,
so that every sample could be a real input.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from inc_clusterq.inputs import InputSpec

BASE_WIDTH = 128  # channels at the start size, as in the released code
LEAST_WIDTH = 16  # halved per stage down to this: a 3x224x224 image then costs about 70 million multiplications
LARGEST_START = 8  # released code: H/4 of 32 pixels
LEAK = 0.2  # slope of LeakyReLU, released code
STAGE_EPS = 0.8  # epsilon of the stages' BatchNorm, released code

_CONV: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORM: dict[int, type[nn.BatchNorm1d] | type[nn.BatchNorm2d] | type[nn.BatchNorm3d]] = {
    0: nn.BatchNorm1d,
    1: nn.BatchNorm1d,
    2: nn.BatchNorm2d,
    3: nn.BatchNorm3d,
}


def stage_sizes(space: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Spatial sizes from the start to the full one; at least one doubling, halving until the largest axis is <= 8."""
    if not space:
        return [(), ()]
    stages = 1
    while math.ceil(max(space) / 2**stages) > LARGEST_START:
        stages += 1
    return [tuple(math.ceil(size / 2**k) for size in space) for k in range(stages, -1, -1)]


def squash(x: Tensor, spec: InputSpec) -> Tensor:
    """tanh(x) spread over the normalised value range; clamped, since rounding may step over its ends."""
    low, high = spec.bounds(x)
    return ((low + high) / 2 + (high - low) / 2 * torch.tanh(x)).clamp(low, high)


class Generator(nn.Module):
    """Latents (N, latent_size) and labels (N,) to normalised inputs (N, *spec.shape); make it with `build_generator`."""

    def __init__(self, spec: InputSpec, num_classes: int, latent_size: int) -> None:
        super().__init__()
        self.spec = spec
        channels, *space = spec.shape
        dims = len(space)
        self.sizes = stage_sizes(tuple(space))
        widths = [max(BASE_WIDTH >> stage, LEAST_WIDTH) for stage in range(len(self.sizes))]
        self.embedding = nn.Embedding(num_classes, latent_size)
        self.project = nn.Linear(latent_size, widths[0] * math.prod(self.sizes[0]))
        self.start = _NORM[dims](widths[0], affine=False)
        self.scale = nn.Embedding(num_classes, widths[0])
        self.shift = nn.Embedding(num_classes, widths[0])
        self.stages = nn.ModuleList(
            nn.Sequential(_mix(dims, wide, narrow), _NORM[dims](narrow, eps=STAGE_EPS), nn.LeakyReLU(LEAK))
            for wide, narrow in pairwise(widths)
        )
        self.paint = _mix(dims, widths[-1], channels)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        h = self.project(z * self.embedding(labels))
        h = self.start(h.unflatten(1, (-1, *self.sizes[0])))
        scale, shift = (_per_channel(table(labels), h) for table in (self.scale, self.shift))
        h = h * scale + shift
        for stage, size in zip(self.stages, self.sizes[1:], strict=True):
            h = _grow(stage(h), size)
        return squash(self.paint(h), self.spec)


def _mix(dims: int, wide: int, narrow: int) -> nn.Module:
    return nn.Linear(wide, narrow) if dims == 0 else _CONV[dims](wide, narrow, 3, padding=1)


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.view(*values.shape, *[1] * (like.dim() - 2))


def _grow(h: Tensor, size: tuple[int, ...]) -> Tensor:
    if not size:
        return h
    h = nn.functional.interpolate(h, scale_factor=2.0, mode="nearest")
    return h[(slice(None), slice(None), *(slice(length) for length in size))]


def build_generator(
    spec: InputSpec, num_classes: int, latent_size: int, rng: torch.Generator, device: torch.device
) -> Generator:
    """A generator whose start values come from `rng` alone: built without memory first, so no global seed is touched."""
    with torch.device("meta"):
        generator = Generator(spec, num_classes, latent_size)
    generator.to(torch.float32).to_empty(device="cpu")
    for part in generator.modules():
        if isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, generator=rng)
        elif isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(part.weight, a=LEAK, generator=rng)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            part.reset_parameters()
    nn.init.ones_(generator.scale.weight)
    return generator.to(device)
