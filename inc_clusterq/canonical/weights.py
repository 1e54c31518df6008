"""Weights that the network computes from other weights, as weights.

Weight normalisation, spectral normalisation and weight standardisation leave operators between a parameter and its convolution.
What they compute does not depend on the input, so it is computed once. The host's quantizer raises where a weight is not an
attribute of the graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from inc_clusterq.reconstruction.graph import WEIGHTED, attribute


@torch.no_grad()
def compute_weights(graph_module: fx.GraphModule) -> int:
    """Replace computed weights and biases of convolutions and linear operators, in place; returns how many there were."""
    graph, values = graph_module.graph, dict[fx.Node, Any]()
    from_input = _from_input(graph)
    count = 0
    for node in [node for node in graph.nodes if node.target in WEIGHTED]:
        for position in (1, 2):  # weight and bias
            computed = node.args[position] if position < len(node.args) else None
            if not isinstance(computed, fx.Node) or computed.op == "get_attr" or computed in from_input:
                continue
            name = f"{computed.name}_computed"
            if not hasattr(graph_module, name):
                graph_module.register_parameter(name, nn.Parameter(_value(graph_module, computed, values).clone()))
                count += 1
            with graph.inserting_before(computed):
                constant = graph.get_attr(name)
            constant.meta = {"val": computed.meta["val"]}
            node.replace_input_with(computed, constant)
    if count:
        _forget_unused(graph_module)
        graph_module.recompile()
    return count


def _from_input(graph: fx.Graph) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _value(graph_module: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """What a node gives that does not depend on the input; `values` remembers what has been computed."""
    if node not in values:
        if node.op == "get_attr":
            values[node] = attribute(graph_module, str(node.target))
        else:
            args: Any = map_arg(node.args, lambda source: _value(graph_module, source, values))
            kwargs: Any = map_arg(node.kwargs, lambda source: _value(graph_module, source, values))
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values[node]


def _forget_unused(graph_module: fx.GraphModule) -> None:
    """Drop operators that nothing reads any more, if they don't write either."""
    for node in reversed(list(graph_module.graph.nodes)):
        if not node.users and node.op in ("get_attr", "call_function") and not node.is_impure():
            graph_module.graph.erase_node(node)
