"""Swing convolution (Genie, "Show Me the Data for Quantization", CVPR 2023, arXiv 2212.04780).

A convolution of stride s reads its input on a fixed grid, so that what is optimised through it grows checkerboards. Before
each one the input is padded by s - 1 with its reflection and cut back to its size at a random offset: in the mean over many
steps every position is read alike. One offset per call and axis, so the samples of a batch move together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_STRIDED = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@contextmanager
def swinging(module: nn.Module, rng: torch.Generator, *, wanted: bool = True) -> Iterator[None]:
    """Let every strided convolution of `module` swing while the context is open, unless it is not `wanted`."""

    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        assert isinstance(layer, _STRIDED)
        x, *rest = args if args else (kwargs["input"],)
        return (swing(x, layer.stride, rng), *rest), {key: value for key, value in kwargs.items() if key != "input"}

    layers = [layer for layer in module.modules() if wanted and isinstance(layer, _STRIDED) and max(layer.stride) > 1]
    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def swing(
    x: Tensor,  # (N, C, *space)
    stride: tuple[int, ...],
    rng: torch.Generator,
) -> Tensor:
    """`x` moved by up to s - 1 along each axis, what leaves it replaced by reflections; an axis too short stays."""
    space = x.shape[2:]
    margins = [min(step - 1, size - 1) for step, size in zip(stride, space, strict=True)]
    if not any(margins):
        return x
    padded = nn.functional.pad(x, [margin for margin in reversed(margins) for _ in range(2)], mode="reflect")
    for axis, (margin, size) in enumerate(zip(margins, space, strict=True), start=2):
        offset = int(torch.randint(2 * margin + 1, (), generator=rng))
        padded = padded.narrow(axis, offset, size)
    return padded
