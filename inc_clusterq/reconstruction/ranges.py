"""Initial quantization ranges by an Lp search (AdaRound, arXiv 2004.10568; p = 2.4 in the released MRECG code).

A range [low, high] is shrunk in equal steps, and the one whose quantized values are nearest in the Lp sense is kept, of
equally near ones of an activation the widest:
    argmin over r in {r_1 .. 1} of  sum | x - Q(x; r low, r high) |^p .
"""

from __future__ import annotations

import torch
from torch import Tensor

CANDIDATES = 80  # steps of the search; the step is 1 % of the full range
SMALLEST = 0.2  # share of the full range below which no candidate lies
EPSILON = torch.finfo(torch.float32).eps  # as in the host's observers: no scale is smaller


def signed_levels(bits: int) -> tuple[int, int]:
    """Lowest and highest integer of a symmetric weight of `bits` bits."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def weight_scale(weight: Tensor, bits: int, norm: float) -> Tensor:
    """Symmetric per-channel scales for `weight` (C, ...); returned with shape (C, 1, ...)."""
    lowest, highest = signed_levels(bits)
    flat = weight.detach().flatten(1)
    full = torch.maximum(flat.amax(1) / highest, flat.amin(1) / lowest).clamp_min(EPSILON)
    best = full.clone()
    error = torch.full_like(full, torch.inf)
    for share in torch.linspace(SMALLEST, 1.0, CANDIDATES).tolist():
        scale = (full * share).clamp_min(EPSILON)
        quantized = (flat / scale[:, None]).round().clamp(lowest, highest) * scale[:, None]
        trial = (quantized - flat).abs().pow(norm).sum(1)
        better = trial < error
        best = torch.where(better, scale, best)
        error = torch.where(better, trial, error)
    return best.reshape(-1, *[1] * (weight.dim() - 1))


def activation_range(
    sample: Tensor,  # any shape: observed values
    low: float,
    high: float,
    bits: int,
    norm: float,
) -> tuple[float, int]:
    """Scale and zero point of an unsigned affine activation whose observed extremes are `low` and `high`.

    Zero is always representable (padding must stay exact), as the host's observers guarantee too.
    """
    top = 2**bits - 1
    low, high = min(low, 0.0), max(high, 0.0)
    sample = sample.detach().flatten().float()
    best, error = (1.0, 0), float("inf")
    for share in torch.linspace(1.0, SMALLEST, CANDIDATES).tolist():
        scale = max((high - low) * share / top, EPSILON)
        zero_point = min(max(round(-low * share / scale), 0), top)
        quantized = ((sample / scale).round() + zero_point).clamp(0, top).sub(zero_point).mul(scale)
        trial = float((quantized - sample).abs().pow(norm).sum())
        if trial < error:
            best, error = (scale, zero_point), trial
    return best
