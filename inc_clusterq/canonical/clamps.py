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
SIX = {aten.relu6.default, aten.relu6_.default}
IN_PLACE = {aten.clamp_.default, aten.clamp_min_.default, aten.relu6_.default}
CLAMPS = {aten.clamp.default, aten.clamp_min.default, *SIX, *IN_PLACE}


def write_clamps_as_activations(graph_module: fx.GraphModule) -> int:
    """Rewrite the clamps behind a convolution, a linear operator or a sum, in place; returns how many there were."""
    changed = 0
    for node in graph_module.graph.nodes:
        if node.target not in CLAMPS or node.args[0].target not in COMPUTES:
            continue
        in_place = node.target in IN_PLACE
        low, high = (0, 6) if node.target in SIX else limits_of(node)
        if low == 0 and high in (None, inf):
            node.target = aten.relu_.default if in_place else aten.relu.default
            node.args, node.kwargs = node.args[:1], {}
        elif is_number(low) and is_number(high) and -inf < low <= high < inf:
            node.target = aten.hardtanh_.default if in_place else aten.hardtanh.default
            node.args, node.kwargs = (node.args[0], low, high), {}
        else:
            continue
        changed += 1
    if changed:
        graph_module.recompile()
    return changed
