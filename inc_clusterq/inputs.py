"""What a model expects at its input: the shape of one sample, the raw values a sensor can produce, their normalisation.

normalised = (raw - mean) / std, per channel; the channel is the first axis of a sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

MOST_PER_BATCH = 4096  # inputs per call of an exported program: the exporters want a bound
LARGE = 96  # pixels of the shorter side from which an image is dear to make, holds many positions, and can be halved


def is_large(shape: Sequence[int]) -> bool:
    """Whether a sample of this shape is a large image, (C, H, W)."""
    return len(shape) == 3 and min(shape[1:]) >= LARGE


@dataclass(frozen=True)
class InputSpec:
    """Shape, range and normalisation of a model's input.

    `shape` is one sample without the batch dimension: (C, H, W), (C, L), (C, D, H, W) or (F,). `low` and `high` bound
    the raw values, before normalisation: 0 and 255 for bytes. `mean` and `std` are on that same raw scale, one number
    for all channels or one per channel; a number by itself is taken as well.
    """

    shape: tuple[int, ...]
    low: float = 0.0
    high: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            value = getattr(self, name)
            object.__setattr__(self, name, (float(value),) if isinstance(value, Real) else tuple(map(float, value)))
        for name in ("low", "high"):  # plain numbers, whatever of NumPy or torch they were: they are written to manifests
            object.__setattr__(self, name, float(getattr(self, name)))
        shape = tuple(map(int, self.shape))
        if not shape or shape != tuple(self.shape) or min(shape) < 1:
            raise ValueError(
                f"shape is {list(self.shape)}; it must hold the positive sizes of one sample without the batch "
                "dimension, for example [3, 224, 224]"
            )
        object.__setattr__(self, "shape", shape)
        if len(self.shape) > 4:
            raise ValueError(f"shape is {list(self.shape)}; a sample has one axis of channels and at most three of space")
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"range is [{self.low:g}, {self.high:g}]; it must be two finite numbers, the lower one first")
        channels = self.shape[0]
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise ValueError(
                    f"{name} has {len(values)} values; shape {list(self.shape)} takes one for all channels"
                    + (f" or {channels}, one per channel" if channels > 1 else "")
                )
            if not all(math.isfinite(value) for value in values):
                raise ValueError(f"{name} is {list(values)}; every value must be finite")
        if any(value != 0 and not self.low <= value <= self.high for value in self.mean):
            raise ValueError(
                f"mean is {list(self.mean)} and range is [{self.low:g}, {self.high:g}]; both are of raw values, before "
                "normalisation, so a mean lies inside the range: [0, 255] goes with a mean such as 123.7, [0, 1] with 0.485"
            )
        if any(value <= 0 for value in self.std):
            raise ValueError(f"std is {list(self.std)}; every value must be above 0")

    def normalise(self, raw: Tensor) -> Tensor:
        """(raw - mean) / std, what the model sees; `raw` has shape (..., *shape)."""
        return (raw - self._per_channel(self.mean, raw)) / self._per_channel(self.std, raw)

    def bounds(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The lowest and the highest normalised value, (C or 1, 1, ...), on the device and of the dtype of `like`."""
        # In the dtype of `like`, not wider: rounding is monotone, so no normalised value falls outside its bounds.
        lowest, highest = (
            self.normalise(torch.tensor(value, dtype=like.dtype, device=like.device)) for value in (self.low, self.high)
        )
        return lowest, highest

    def middle(self, samples: int, device: torch.device | None = None) -> Tensor:
        """Normalised inputs in the middle of the value range, (samples, *shape), float32."""
        low, high = self.bounds(torch.zeros((), dtype=torch.float32, device=device))
        return ((low + high) / 2).expand(samples, *self.shape)

    def _per_channel(self, values: tuple[float, ...], like: Tensor) -> Tensor:
        dtype = like.dtype if like.is_floating_point() else torch.float32
        return torch.tensor(values, dtype=dtype, device=like.device).view(-1, *[1] * (len(self.shape) - 1))
