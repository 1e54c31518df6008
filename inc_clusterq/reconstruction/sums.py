"""Sums of products over whole maps, which make up much of a step besides its convolutions, in one pass over the memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inc_clusterq.layout import has_channels_last, in_order

PRODUCTS = 2**18  # in one running sum; more would cost digits


def inner(a: Tensor, b: Tensor) -> Tensor:
    """The sum of a * b over all elements; shapes are the same."""
    if a.device.type != "cpu" or has_channels_last(a) != has_channels_last(b):
        return (a * b).sum()
    pairs = zip(in_order(a).split(PRODUCTS), in_order(b).split(PRODUCTS), strict=True)
    return torch.stack([torch.dot(one, other) for one, other in pairs]).sum()


def squared_error(found: Tensor, exact: Tensor) -> Tensor:
    """|| found - exact ||^2 over all elements, with a gradient for `found` alone."""
    result: Tensor = _SquaredError.apply(found, exact)
    return result


class _SquaredError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, found: Tensor, exact: Tensor) -> Tensor:
        difference = found - exact
        ctx.save_for_backward(difference)
        return inner(difference, difference)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        return difference * (2 * grads[0]), None
