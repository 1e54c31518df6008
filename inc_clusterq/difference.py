"""How far two outputs for the same inputs are apart, and what they are measured by."""

from __future__ import annotations

import torch
from torch import Tensor

FAR = 100.0  # far beyond what classes differ by


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """The largest absolute difference, as a share of the largest expected value, single classes (`drawn_in`) aside.

    A network of logarithms or roots has outputs that are not finite for some numbers; they must be so in both.
    """
    finite = expected.isfinite()
    if not finite.equal(found.isfinite()):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    usual = drawn_in(expected) if bool(finite.all()) else expected
    return float((found - expected)[finite].abs().max() / usual[finite].abs().max().clamp_min(1e-12))


def drawn_in(outputs: Tensor) -> Tensor:
    """Outputs (N, classes, ...) without what lifts single classes out of their range whatever the input.

    Beside a class that is masked out by a large constant no difference and no error would be large. So classes whose mean over
    the samples lies further from the median class's than `FAR` times what is usual, and than `FAR` times their own deviation,
    count as if it lay there. Usual is the median of these distances, or of the deviations where that is larger. Outputs without
    such classes stay as they are.
    """
    if outputs.dim() < 2 or not len(outputs):
        return outputs
    means = outputs.mean(0, dtype=torch.float64).to(outputs.dtype)
    middle = means.median()
    deviations = outputs.std(0, correction=0)
    usual = torch.maximum((means - middle).abs().median(), deviations.median())
    if usual == 0:  # most are the same, whatever the input
        return outputs
    lifted = (means - middle).abs() > FAR * deviations.clamp_min(usual)
    return torch.where(lifted, outputs - means + middle, outputs)
