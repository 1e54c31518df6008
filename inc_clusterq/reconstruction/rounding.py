"""Learned rounding (AdaRound, arXiv 2004.10568, Eqs. 22 to 24), as MRECG uses it.

    h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)                     rectified sigmoid
    ^W   = s clip(floor(W / s) + h(V), n, p)                    soft weights during optimisation
    R(V) = sum (1 - |2 h(V) - 1|^beta)                          pushes every h to 0 or 1
beta falls linearly from `beta_start` to `beta_end` once the warm-up is over; during it R does not count.
"""

from __future__ import annotations

import torch
from torch import Tensor

ZETA, GAMMA = 1.1, -0.1  # stretch of the sigmoid


def soft_rounding(v: Tensor) -> Tensor:
    """h(V), in [0, 1]."""
    return torch.sigmoid(v).mul(ZETA - GAMMA).add(GAMMA).clamp(0, 1)


def initial_v(fraction: Tensor) -> Tensor:
    """V with h(V) = `fraction` (in [0, 1)): the soft weights start at the float weights."""
    return -torch.log((ZETA - GAMMA) / (fraction - GAMMA) - 1)


def regulariser(v: Tensor, beta: float) -> Tensor:
    """R(V), a scalar."""
    return (1 - (2 * soft_rounding(v) - 1).abs().pow(beta)).sum()


def beta_at(step: int, steps: int, start: float, end: float, warm_up: float) -> float | None:
    """Exponent at `step` of `steps`; None during the warm-up."""
    begin = warm_up * steps
    if step < begin:
        return None
    remaining = 1 - (step - begin) / max(steps - begin, 1)
    return end + (start - end) * remaining
