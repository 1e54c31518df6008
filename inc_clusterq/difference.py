"""How far two outputs for the same inputs are apart."""

from __future__ import annotations

from torch import Tensor


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """The largest absolute difference, as a share of the largest expected value.

    A network of logarithms or roots has outputs that are not finite for some numbers; they must be so in both.
    """
    finite = expected.isfinite()
    if not finite.equal(found.isfinite()):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    found, expected = found[finite], expected[finite]
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
