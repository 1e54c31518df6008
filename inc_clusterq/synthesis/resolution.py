"""Coarse to fine: the first steps at half the image size, where each costs a quarter, the rest at the full one.

Shapes, colours and classes come about at any size; what half-size images lack, enlarged, is the finest texture, and the
steps at the full size bring its statistics back. Only images, (C, H, W), have a size that can be halved without being
something else.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from inc_clusterq.inputs import InputSpec, is_large
from inc_clusterq.synthesis.teacher import Teacher


def half_size(teacher: Teacher, spec: InputSpec) -> InputSpec | None:
    """The specification of images of half the size; None for what is no image, too small, or needed at its size."""
    if not is_large(spec.shape):
        return None
    channels, *space = spec.shape
    half = replace(spec, shape=(channels, *(math.ceil(size / 2) for size in space)))
    try:
        with torch.no_grad():
            seen = teacher.observe(half.middle(2, teacher.device))
    except Exception:  # users' networks refuse a size in words of their own
        return None
    return half if seen.logits is None or seen.logits.shape == (2, teacher.num_classes) else None


def enlarge(x: Tensor, spec: InputSpec) -> Tensor:
    """Images (N, C, h, w) at the size of `spec`, interpolated between neighbours, inside the value range."""
    low, high = spec.bounds(x)
    return nn.functional.interpolate(x, spec.shape[1:], mode="bilinear", align_corners=False).clamp(low, high)
