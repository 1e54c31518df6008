"""Images as pixels, or as sums of waves, the slow ones in large steps: those leave the spectrum of photographs alone.

The amplitude of a wave of f periods per image falls in photographs about as 1 / f (Field, "Relations between the statistics
of natural images and the response properties of cortical cells", 1987). Adam gives every parameter steps of the same size, so
where these are pixels, what it adds is white: all frequencies alike, far more fine grain than any photograph has. Here the
parameters are the waves' coefficients c, weighted with

    w_f proportional to max(|f|, 1)^-alpha,   mean square 1,      image = clip(start + b F^-1(w c))

with F^-1 the orthonormal inverse Fourier transform, so that a step of c changes pixels as much as one of the pixels themselves.
Adam moves flat places as far as busy ones, too, where photographs have sky beside grass. So what the waves add is larger where
the start has more contrast around a place, and smaller where it has less (b, `busyness`; mean square 1 over a batch).
The same parametrisation makes feature visualisations smooth (Olah, Mordvintsev, Schubert, "Feature Visualization", Distill,
2017). BatchNorm remembers means and variances; how the values of different channels and neighbours hang together it
does not, and that is what quantized layers have to be adapted to. There the start and the waves speak for real images.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

# By trial: of a window half or twice as large nothing was seen, and the full contrast moves correlations between channels away.
WINDOW = 1 / 16  # of the shorter side, around a place
BUSY_POWER, LEAST_BUSY = 0.5, 0.2  # b is proportional to contrast^0.5, of mean square 1, and 0.2
EPSILON = 1e-3  # contrast of what has none, a share of the value range


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


def busyness(images: Tensor) -> Tensor:
    """b of images (N, C, *space) that hold shares of the value range, shape (N, 1, *space)."""
    space = tuple(images.shape[2:])
    reach = round(min(space) * WINDOW / 2)
    pool = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[len(space) - 1]

    def around(x: Tensor) -> Tensor:
        mean: Tensor = pool(x, 2 * reach + 1, 1, reach, count_include_pad=False)
        return mean

    grey = images.mean(1, keepdim=True)
    contrast = (around(grey.square()) - around(grey).square()).clamp_min(0).sqrt().clamp_min(EPSILON)
    return _of_mean_square_one(_of_mean_square_one(contrast**BUSY_POWER) + LEAST_BUSY)


def _of_mean_square_one(maps: Tensor) -> Tensor:
    return maps / maps.square().mean().sqrt()


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
        self._weights, self._busyness = wave_weights(self._space, alpha).to(start), busyness(start)
        # Real and imaginary part side by side: Adam's second moment would else tie them together.
        self.parameter = start.new_zeros(*start.shape[:2], *self._weights.shape, 2).requires_grad_()

    def unit(self) -> Tensor:
        """The batch as it stands, shares of the value range."""
        spectrum = torch.view_as_complex(self.parameter) * self._weights
        axes = tuple(range(2, 2 + len(self._space)))
        added: Tensor = torch.fft.irfftn(spectrum, self._space, axes, norm="ortho")
        return torch.addcmul(self._start, added, self._busyness).clamp(0, 1)

    def bound(self) -> None:
        """Nothing to do: `unit` clips, and the waves have no range of their own."""
