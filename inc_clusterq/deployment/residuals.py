"""Keeps residuals of 8 bits out of convolutions that have had their activation, on which Inductor's compiler gives up.

Where a convolution is followed by an activation and then by the addition of a dequantized tensor, such as a pooled shortcut,
Inductor's pattern for residual additions takes the kernel for one without an activation and ends in an assertion; the host's
own static model does the same. A maximum with less than the least number that the residual can be changes no value, and no
pattern knows it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from inc_clusterq.deployment.arithmetic import PRODUCTS
from inc_clusterq.deployment.backend import DEQUANTIZE
from inc_clusterq.deployment.operators import KINDS

aten = torch.ops.aten


def set_residuals_apart(graph_module: fx.GraphModule) -> int:
    """Put that maximum in front of such additions; returns how many there are."""
    graph = graph_module.graph
    count = 0
    for addition in [node for node in graph.nodes if KINDS.get(node.target) == "addition"]:
        for activated, residual in (addition.args, addition.args[::-1]):
            if not (_follows_product(activated) and isinstance(residual, fx.Node) and residual.target is DEQUANTIZE):
                continue
            _, scale, zero_point, lowest, *_ = residual.args
            less: Any = (lowest - 1 - zero_point) * scale  # type: ignore[operator]
            with graph.inserting_before(addition):
                apart = graph.call_function(aten.clamp_min.default, (residual, less))
            apart.meta.update(residual.meta)
            addition.replace_input_with(residual, apart)
            count += 1
    graph_module.recompile()
    return count


def _follows_product(node: Any) -> bool:
    """Whether a convolution or linear operator has one more function, whichever, in front of the addition."""
    source = node.args[0] if isinstance(node, fx.Node) and node.args else None
    return isinstance(source, fx.Node) and source.target in PRODUCTS
