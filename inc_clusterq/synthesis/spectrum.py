"""Images as pixels, or as sums of waves, the slow ones in large steps: those leave the spectrum of photographs alone.

The amplitude of a wave of f periods per image falls in photographs about as 1 / f (Field, "Relations between the statistics
of natural images and the response properties of cortical cells", 1987). Adam gives every parameter steps of the same size, so
where these are pixels, what it adds is white: all frequencies alike, far more fine grain than any photograph has. Here the
parameters are the waves' coefficients c, weighted with

    w_f proportional to max(|f|, 1)^-alpha,   mean square 1,      image = clip(start + F^-1(w c))

with F^-1 the orthonormal inverse Fourier transform, so that a step of c changes pixels as much as one of the pixels themselves.
The same parametrisation makes feature visualisations smooth (Olah, Mordvintsev, Schubert, "Feature Visualization", Distill,
2017). BatchNorm remembers means and variances; how the values of different channels and neighbours hang together it
does not, and that is what quantized layers have to be adapted to. There the start and the waves speak for real images.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def wave_weights(space: tuple[int, ...], alpha: float) -> Tensor:
    """w_f for every coefficient that `torch.fft.rfftn` gives of a map of size `space`, (*space[:-1], space[-1] // 2 + 1)."""
    axes = [torch.fft.fftfreq(size) * size for size in space[:-1]] + [torch.fft.rfftfreq(space[-1]) * space[-1]]
    squares = sum(axis.square() for axis in torch.meshgrid(*axes, indexing="ij"))
    weights = torch.as_tensor(squares).sqrt().clamp_min(1) ** -alpha
    return weights / _root_mean_square(weights, space[-1])


def _root_mean_square(weights: Tensor, length: int) -> Tensor:
    """Over all waves; a real map's transform leaves out those whose partner of opposite frequency is kept."""
    counts = torch.full((weights.shape[-1],), 2.0)
    counts[0] = 1
    if length % 2 == 0:
        counts[-1] = 1
    return ((weights.square() * counts).sum() / (counts.sum() * math.prod(weights.shape[:-1]))).sqrt()


class Pixels:
    """A batch of `start` values, shape (N, C, *space), that moves as it stands."""

    def __init__(self, start: Tensor) -> None:
        self.parameter = start.requires_grad_()

    def unit(self) -> Tensor:
        """The batch as it stands, shares of the value range."""
        return self.parameter

    @torch.no_grad()
    def bound(self) -> None:
        """Back into the range after a step."""
        self.parameter.clamp_(0, 1)


class Waves:
    """What is added to a batch of `start` values, shape (N, C, *space), as weighted waves that begin at zero."""

    def __init__(self, start: Tensor, alpha: float) -> None:
        self._start, self._space = start, tuple(start.shape[2:])
        self._weights = wave_weights(self._space, alpha).to(start)
        # Real and imaginary part side by side: Adam's second moment would else tie them together.
        self.parameter = start.new_zeros(*start.shape[:2], *self._weights.shape, 2).requires_grad_()

    def unit(self) -> Tensor:
        """The batch as it stands, shares of the value range."""
        spectrum = torch.view_as_complex(self.parameter) * self._weights
        axes = tuple(range(2, 2 + len(self._space)))
        added: Tensor = torch.fft.irfftn(spectrum, self._space, axes, norm="ortho")
        return (self._start + added).clamp(0, 1)

    def bound(self) -> None:
        """Nothing to do: `unit` clips, and the waves have no range of their own."""
