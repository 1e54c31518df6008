"""Strides, paddings and dilations with one value for every axis.

A list of one value, `stride=[2]`, stands for all axes and is exported as it was written; what reads a convolution's arguments
expects one per axis.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
CONVOLUTIONS = {
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
}
SIZES = {"stride", "padding", "output_padding", "dilation"}


def write_sizes_in_full(graph_module: fx.GraphModule) -> int:
    """Rewrite the convolutions that have one value for all axes, in place; returns how many there were."""
    changed = 0
    for node in graph_module.graph.nodes:
        if node.target not in CONVOLUTIONS:
            continue
        axes = node.args[1].meta["val"].dim() - 2
        before = node.args, node.kwargs
        names = [argument.name for argument in node.target._schema.arguments]
        node.args = tuple(_in_full(name, value, axes) for name, value in zip(names, node.args, strict=False))
        node.kwargs = {name: _in_full(name, value, axes) for name, value in node.kwargs.items()}
        changed += before != (node.args, node.kwargs)
    if changed:
        graph_module.recompile()
    return changed


def _in_full(name: str, value: Any, axes: int) -> Any:
    return [*value] * axes if name in SIZES and isinstance(value, (list, tuple)) and len(value) == 1 else value
