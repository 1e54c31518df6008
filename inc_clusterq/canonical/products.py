"""Products with a matrix of the network's own, as linear operators: the host's quantizer knows these by no other name."""

from __future__ import annotations

import torch
from torch import fx
from torch.nn import functional

from inc_clusterq.canonical.origin import SOURCE
from inc_clusterq.nodes import active_nodes

aten = torch.ops.aten
PRODUCTS = {aten.matmul.default, aten.mm.default}


def write_products_as_linear(graph_module: fx.GraphModule) -> int:
    """Replace products of what depends on the input with a matrix that does not, in place; returns how many there were."""
    graph, active = graph_module.graph, active_nodes(graph_module)
    found = [node for node in graph.nodes if node.target in PRODUCTS or node.target is aten.addmm.default]
    replaced = 0
    for node in found:
        *added, features, matrix = node.args
        if node.kwargs or features not in active or matrix in active or matrix.meta["val"].dim() != 2:
            continue
        if added and (added[0] in active or added[0].meta["val"].dim() != 1):
            continue
        if features.meta["val"].dim() < 2:
            continue
        with graph.inserting_before(node):
            weight = graph.call_function(aten.t.default, (matrix,))
            weight.meta = {"val": matrix.meta["val"].t()}
            linear = graph.call_function(aten.linear.default, (features, weight, *added))
        linear.meta = {**node.meta, SOURCE: [(linear.name, functional.linear)]}
        node.replace_all_uses_with(linear)
        graph.erase_node(node)
        replaced += 1
    if replaced:
        graph_module.recompile()
    return replaced
