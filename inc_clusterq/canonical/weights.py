"""Weights that the network computes from other weights, as weights.

Weight normalisation, spectral normalisation and weight standardisation leave operators between a parameter and its convolution.
What they compute does not depend on the input, so it is computed once. Left as they are, the host quantizes some of them, and
raises where BatchNorm is to be folded into one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from inc_clusterq.attributes import attribute, unused_name
from inc_clusterq.nodes import active_nodes
from inc_clusterq.reconstruction.layers import WEIGHTED

BIAS = 2  # its position among the arguments, where there is one


@torch.no_grad()
def compute_weights(graph_module: fx.GraphModule) -> int:
    """Replace computed weights and biases of convolutions and linear operators, in place; returns how many there were.

    What draws random numbers, or is overwritten with what depends on the input, stays as it is.
    """
    graph, active = graph_module.graph, active_nodes(graph_module)
    computed: dict[fx.Node, str] = {}  # node -> the attribute that has its value
    for node in [node for node in graph.nodes if node.target in WEIGHTED]:
        for source in [node.args[position] for position in (WEIGHTED[node.target], BIAS) if position < len(node.args)]:
            if not isinstance(source, fx.Node) or source.op == "get_attr" or source in active:
                continue
            if source not in computed:
                parts = _computation(graph, source, node, active)
                if parts is None:
                    continue
                computed[source] = unused_name(graph_module, f"{source.name}_computed")
                value = _value(graph_module, source, parts).clone(memory_format=torch.contiguous_format)
                graph_module.register_parameter(computed[source], nn.Parameter(value))
            with graph.inserting_before(source):
                constant = graph.get_attr(computed[source])
            constant.meta = {"val": source.meta["val"]}
            node.replace_input_with(source, constant)
    if computed:
        _forget_unused(graph)
        graph_module.recompile()
    return len(computed)


def _computation(graph: fx.Graph, source: fx.Node, reader: fx.Node, active: set[fx.Node]) -> set[fx.Node] | None:
    """All operators that `source` depends on, those that overwrite it in place included; None where it is no constant."""
    parts = _ancestors(source, active)
    order = list(graph.nodes)
    writing = [node for node in order if node.op == "call_function" and node.is_impure() and not _is_random(node)]
    while writers := [node for node in writing if node not in parts and (_ancestors(node, active) - {node}) & parts]:
        if any(node in active for node in writers) or order.index(writers[-1]) > order.index(reader):
            return None
        for node in writers:
            parts |= _ancestors(node, active)
    return None if any(map(_is_random, parts)) else parts


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _ancestors(node: fx.Node, active: set[fx.Node]) -> set[fx.Node]:
    """The node and what it is computed from, as far as that does not depend on the input."""
    found, pending = {node}, [node]
    while pending:
        sources = {source for source in pending.pop().all_input_nodes if source not in active} - found
        found |= sources
        pending += sources
    return found


def _value(graph_module: fx.GraphModule, wanted: fx.Node, parts: set[fx.Node]) -> torch.Tensor:
    values: dict[fx.Node, Any] = {}
    for node in graph_module.graph.nodes:
        if node not in parts:
            continue
        if node.op == "get_attr":
            values[node] = attribute(graph_module, str(node.target)).clone()  # it is the user's, and may be overwritten
        else:
            args: Any = map_arg(node.args, values.__getitem__)
            kwargs: Any = map_arg(node.kwargs, values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    value: torch.Tensor = values[wanted]
    return value


def _forget_unused(graph: fx.Graph) -> None:
    """Drop operators that nothing reads any more, if they don't write either."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op in ("get_attr", "call_function") and not node.is_impure():
            graph.erase_node(node)
