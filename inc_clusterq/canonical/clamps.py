"""Clamps that are activation functions, written as such.

`x.clamp(min=0)` is ReLU, and `x.clamp(0, 6)` and `functional.relu6` are ReLU6; but the host's patterns and the epilogues of the
kernels know `relu` and `hardtanh` alone. Behind another pass over a map, such as a pool, a clamp stays what it is.
"""

from __future__ import annotations

from math import inf

import torch
from torch import fx

from inc_clusterq.nodes import is_number, limits_of

aten = torch.ops.aten
COMPUTES = {  # what kernels clamp on their way out, and the norm that is folded into it
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.linear.default,
    aten.batch_norm.default,
    aten.add.Tensor,
    aten.add_.Tensor,
}
CLAMPS = {  # to ReLU and to clamping at both ends, in place or not
    aten.clamp.default: (aten.relu.default, aten.hardtanh.default),
    aten.clamp_.default: (aten.relu_.default, aten.hardtanh_.default),
    aten.clamp_min.default: (aten.relu.default, aten.hardtanh.default),
    aten.clamp_min_.default: (aten.relu_.default, aten.hardtanh_.default),
    aten.relu6.default: (aten.relu.default, aten.hardtanh.default),
    aten.relu6_.default: (aten.relu_.default, aten.hardtanh_.default),
}
SIX = {aten.relu6.default, aten.relu6_.default}


def write_clamps_as_activations(graph_module: fx.GraphModule) -> int:
    """Rewrite the clamps behind a convolution, a linear operator or a sum, in place; returns how many there were."""
    changed = 0
    for node in graph_module.graph.nodes:
        if node.target not in CLAMPS or node.args[0].target not in COMPUTES:
            continue
        relu, hardtanh = CLAMPS[node.target]
        low, high = (0, 6) if node.target in SIX else limits_of(node)
        if low == 0 and high in (None, inf):
            node.target, node.args, node.kwargs = relu, node.args[:1], {}
        elif is_number(low) and is_number(high) and -inf < low <= high < inf:
            node.target, node.args, node.kwargs = hardtanh, (node.args[0], low, high), {}
        else:
            continue
        changed += 1
    if changed:
        graph_module.recompile()
    return changed
