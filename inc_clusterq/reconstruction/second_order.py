"""Rounding of one layer from the moments of its inputs, without iterations: the start of the learned rounding.

With x the layer's float input, x^ the one that the quantized layers before it hand on, m and m^ their means, and the bias
free, a row w of the weights wants integers q and a step s with
    min E (w'(x - m) - s q'(x^ - m^))^2 = (s q - w*)' A (s q - w*) + const,
    A = Cov(x^),   w* = A^-1 Cov(x^, x) w                         the float weights that suit the input that there is.
Where the input varies little, w* is drawn back to w (the pull), so that it does not suit the calibration images alone.
Rounding column by column and moving each error on to the columns left is OBQ (arXiv 2208.11580) in the order of GPTQ
(arXiv 2210.17323). Every row is solved for several steps s, and the one of least error stays; passes of coordinate descent on
the same quadratic follow. Groups are solved side by side; a depthwise convolution is a group of n = 9 per channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inc_clusterq.reconstruction.moments import Moments
from inc_clusterq.reconstruction.ranges import EPSILON, signed_levels

# All are shares of A's mean diagonal, and by trial.
DAMPING = 0.1  # added to the diagonal of A; GPTQ has 0.01
MOST_DAMPING = 1e9  # with more A counts for nothing; only NaN or infinity comes here
PULL = 3.0  # of w* towards w: only directions in which the input varies several times as much as on average adapt
FEW_SAMPLES = 4.0  # weight of n / samples, added to it: with few samples w* fits them rather than what is behind them
SHARES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)  # steps tried, as shares of the one without clipping
PASSES = 4  # of coordinate descent
NOISE = 1e-5  # of the power of an input: more than single precision leaves of a variance that is zero
BLOCK = 64  # columns whose effect on all others is worked out at once


def best_rounding(
    weight: Tensor,  # shape: (G, R, n)
    moments: Moments,
    bits: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Integers (G, R, n), steps (G, R, 1), and the real-valued levels w* / s that the integers stand for."""
    target = adapted(weight, moments)
    hessian, upper = _factored(moments)
    lowest, highest = signed_levels(bits)
    full = torch.maximum(target.amax(-1, keepdim=True) / highest, target.amin(-1, keepdim=True) / lowest).clamp_min(EPSILON)
    integers, scale = torch.zeros_like(target), full.clone()
    least = torch.full_like(full, torch.inf)
    for share in SHARES:
        found = round_columns(target, upper, full * share, lowest, highest)
        error = quadratic(found * (full * share) - target, hessian)
        better = error < least
        least = torch.where(better, error, least)
        scale = torch.where(better, full * share, scale)
        integers = torch.where(better, found, integers)
    return descend(integers, target, hessian, scale, lowest, highest), scale, target / scale


def adapted(weight: Tensor, moments: Moments, pull: float = PULL) -> Tensor:
    """w*; shapes (G, R, n)."""
    share = pull + FEW_SAMPLES * weight.shape[-1] / moments.samples
    damping = share * _unit(moments)
    wanted = weight @ moments.cross.mT + damping * weight
    solved: Tensor = torch.linalg.solve(_damped(moments, share), wanted.mT)
    return solved.mT


def quadratic(difference: Tensor, hessian: Tensor) -> Tensor:
    """d' A d of every row; shapes (G, R, n) and (G, n, n) to (G, R, 1)."""
    return ((difference @ hessian) * difference).sum(-1, keepdim=True)


def round_columns(target: Tensor, upper: Tensor, scale: Tensor, lowest: int, highest: int) -> Tensor:
    """Integers of every row, column by column; `upper` is the Cholesky factor U of A^-1 = U'U."""
    left, integers = target.clone(), torch.empty_like(target)
    for begin in range(0, target.shape[-1], BLOCK):
        end = min(begin + BLOCK, target.shape[-1])
        errors = torch.empty_like(target[..., begin:end])
        for j in range(begin, end):
            column = left[..., j : j + 1]
            integers[..., j : j + 1] = (column / scale).round().clamp(lowest, highest)
            error = (column - integers[..., j : j + 1] * scale) / upper[:, j, j, None, None]
            left[..., j + 1 : end] -= error * upper[:, None, j, j + 1 : end]
            errors[..., j - begin : j - begin + 1] = error
        left[..., end:] -= errors @ upper[:, begin:end, end:]
    return integers


def descend(integers: Tensor, target: Tensor, hessian: Tensor, scale: Tensor, lowest: int, highest: int) -> Tensor:
    """Set each integer in turn to its best value while the others stay; the error of no row grows."""
    integers = integers.clone()
    gradient = (integers * scale - target) @ hessian
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)[:, None]
    for _ in range(PASSES):
        for begin in range(0, target.shape[-1], BLOCK):
            block = slice(begin, min(begin + BLOCK, target.shape[-1]))
            before, inner = integers[..., block].clone(), hessian[:, block, block]
            local = gradient[..., block].clone()
            for j in range(before.shape[-1]):
                now = integers[..., begin + j]
                best = now - local[..., j] / (scale[..., 0] * diagonal[..., begin + j])
                best = best.round().clamp(lowest, highest)
                local += ((best - now) * scale[..., 0])[..., None] * inner[:, None, j]
                integers[..., begin + j] = best
            gradient += ((integers[..., block] - before) * scale) @ hessian[:, block]
    return integers


def _factored(moments: Moments) -> tuple[Tensor, Tensor]:
    """The damped A, shape (G, n, n), and U with A^-1 = U'U; damped more where rounding errors have left A without one."""
    share = DAMPING
    while share < MOST_DAMPING:
        hessian = _damped(moments, share)
        factor, failed = torch.linalg.cholesky_ex(hessian)
        if not bool(failed.any()):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
        if not bool(failed.any()):
            return hessian, upper
        share *= 10
    raise ValueError("the moments of a layer's inputs are not finite")


def _damped(moments: Moments, share: float) -> Tensor:
    covariance = moments.covariance
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    return covariance + share * _unit(moments) * eye


def _unit(moments: Moments) -> Tensor:
    """Mean diagonal of A, shape (G, 1, 1); where the input hardly varies, what rounding errors leave of it does not count."""
    variance = moments.covariance.diagonal(dim1=-2, dim2=-1).mean(-1)
    power = moments.mean.square().mean(-1)
    return (variance.clamp_min(0) + NOISE * power).clamp_min(EPSILON**2)[:, None, None]
