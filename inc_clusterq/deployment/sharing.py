"""A weight that several operators share gets a copy for each: Inductor's int8 patterns want it for themselves."""

from __future__ import annotations

from torch import Tensor, fx

from inc_clusterq.attributes import read_instead, unused_name
from inc_clusterq.deployment.backend import DEQUANTIZE_WEIGHT

CONSTANTS = (0, 1)  # places of integers and scales among the arguments


def separate_shared_weights(graph_module: fx.GraphModule) -> None:
    """Give every reader of shared integers their own, in place."""
    graph = graph_module.graph
    taken: set[str] = set()
    for node in [node for node in graph.nodes if node.target is DEQUANTIZE_WEIGHT]:
        for place in CONSTANTS:
            constant = node.args[place]
            if not isinstance(constant, fx.Node) or constant.op != "get_attr":
                continue
            name = str(constant.target)
            if name in taken:
                value: Tensor = graph_module.get_buffer(name)
                name = unused_name(graph_module, f"{name}_again")
                graph_module.register_buffer(name, value.clone())
                read_instead(node, constant, name)
            taken.add(name)
    graph_module.recompile()
