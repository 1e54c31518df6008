"""Rewrites the explicit clamps of activations below 8 bits so that Inductor keeps them inside its int8 kernels.

A kernel's epilogue takes `hardtanh` and `relu`, not `clamp`; a clamp therefore costs a pass over the tensor in float. Behind
a convolution or linear operator, with or without ReLU or ReLU6, the clamp becomes one hardtanh(low, high) with the tighter
of the limits, which leaves the eager result as it is to the bit.

Behind a residual addition the epilogue takes `relu` alone, and the clamp stays. Moving the integers to the top of uint8, so
that the saturation at 255 is the clamp, was tried: it fuses, but the next convolution then pads with a zero point that is
not 0, which costs more than it gains.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from inc_clusterq.deployment.backend import QUANTIZE

aten = torch.ops.aten
MULTIPLIES = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.linear.default}
RELUS = {aten.relu.default}
HARDTANHS = {aten.hardtanh.default}


def fuse_clamps(graph_module: fx.GraphModule) -> int:
    """Rewrite the clamps in front of quantize nodes where that is possible; returns how many are left as they were."""
    left = 0
    for clamp in [node for node in graph_module.graph.nodes if node.target is aten.clamp.default]:
        quantize = next(iter(clamp.users))
        if len(clamp.users) != 1 or quantize.target is not QUANTIZE:
            continue
        if not _into_hardtanh(graph_module.graph, clamp):
            left += 1
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return left


def _into_hardtanh(graph: fx.Graph, clamp: fx.Node) -> bool:
    x, low, high = clamp.args
    assert isinstance(x, fx.Node)
    limits = _limits(x)
    if limits is not None:
        if len(x.users) != 1 or not isinstance(x.args[0], fx.Node):
            return False
        # max(a, low) and min(b, high) commute only while the intervals overlap; here both hold 0.
        low, high = max(low, limits[0]), min(high, limits[1])  # type: ignore[type-var]
        x = x.args[0]
    if x.target not in MULTIPLIES or len(x.users) != 1:
        return False
    with graph.inserting_before(clamp):
        hardtanh = graph.call_function(aten.hardtanh.default, (x, low, high))
    hardtanh.meta.update(clamp.meta)
    clamp.replace_all_uses_with(hardtanh)
    return True


def _limits(node: fx.Node) -> tuple[float, float] | None:
    """Interval that an activation function cuts to; None for anything else."""
    if node.target in RELUS:
        return 0.0, float("inf")
    if node.target in HARDTANHS:
        bounds: Any = [*node.args[1:], *[-1.0, 1.0][len(node.args) - 1 :]]
        return float(bounds[0]), float(bounds[1])
    return None
