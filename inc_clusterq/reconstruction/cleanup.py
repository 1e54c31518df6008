"""What the exporter leaves in a graph that stands in the way of cutting it: guards, writes in place, one batch size for all."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from inc_clusterq.nodes import first_axis

aten = torch.ops.aten


def make_cuttable(graph_module: fx.GraphModule) -> None:
    """Rewrite the graph in place, so that it can be cut wherever one tensor crosses; it computes what it did."""
    erase_guards(graph_module)
    functionalise(graph_module)
    localise_batch_sizes(graph_module)


def erase_guards(graph_module: fx.GraphModule) -> None:
    """Remove the calls that check input shapes; they have no output, and a cut graph cannot satisfy them."""
    for node in list(graph_module.graph.nodes):
        if node.op == "call_module" and str(node.target) == "_guards_fn":
            graph_module.graph.erase_node(node)
    graph_module.recompile()


def functionalise(graph_module: fx.GraphModule) -> None:
    """Let operators that overwrite their input make a new tensor instead.

    Exported graphs keep `x += y` and `relu(inplace=True)`. Cut at such a tensor, a unit would overwrite its own input, and
    inside a unit autograd would miss what a learned quantizer has seen.
    """
    graph = graph_module.graph
    rank = {node: position for position, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        twin = _functional_twin(node.target)
        if twin is None:
            continue
        node.target = twin
        overwritten = node.args[0]
        for user in list(overwritten.users):
            if rank[user] > rank[node]:  # it reads what the operator has written
                user.replace_input_with(overwritten, node)
    graph_module.recompile()


def _functional_twin(target: Any) -> Any:
    """The operator that returns what `target` writes into its first argument; None where `target` writes nothing."""
    if not (isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable):
        return None
    namespace, name = target._schema.name.split("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None) if name.endswith("_") else None
    return getattr(packet, target._overloadname, None)


def localise_batch_sizes(graph_module: fx.GraphModule) -> None:
    """Let every reader of the batch size take it from a tensor it has at hand.

    The exporter reads it once, from the input; that one number would cross every cut of a network that reshapes.
    """
    graph = graph_module.graph
    for size in [node for node in graph.nodes if node.target is aten.sym_size.int and node.args[1] == 0]:
        for user in list(size.users):
            near = next((other for other in user.all_input_nodes if first_axis(other) == str(size.meta.get("val"))), None)
            if near is None or near is size.args[0]:
                continue
            with graph.inserting_before(user):
                local = graph.call_function(aten.sym_size.int, (near, 0))
            local.meta.update(size.meta)
            user.replace_input_with(size, local)
    graph.eliminate_dead_code()
    graph_module.recompile()
