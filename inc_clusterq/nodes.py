"""What the nodes of an exported or prepared graph tell."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx


def is_observer(node: fx.Node) -> bool:
    """The node is a quantizer's place: a module that the host has put there."""
    return node.op == "call_module" and str(node.target).startswith("activation_post_process")


def active_nodes(graph_module: fx.GraphModule) -> set[fx.Node]:
    """Nodes that depend on the input."""
    active: set[fx.Node] = set()
    for node in graph_module.graph.nodes:
        if node.op == "placeholder" or any(argument in active for argument in node.all_input_nodes):
            active.add(node)
    return active


def first_axis(node: fx.Node) -> str | None:
    """The size of a tensor's first axis as an expression; None for what has none.

    Sizes must not be compared as numbers: that holds the exporter's batch size for the only one.
    """
    value = node.meta.get("val")
    if value is None and is_observer(node):  # as what it observes
        value = node.all_input_nodes[0].meta.get("val")
    return str(value.shape[0]) if isinstance(value, Tensor) and value.dim() else None


def named_arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of an operator by name, defaults included."""
    named: dict[str, Any] = {}
    for position, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        default = argument.default_value
        named[argument.name] = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name, default)
    return named


def limits_of(clamp: fx.Node) -> tuple[Any, Any]:
    """Lower and upper limit of a clamp of any kind; None where it has none."""
    low, high = (*clamp.args[1:], None, None)[:2]
    return clamp.kwargs.get("min", low), clamp.kwargs.get("max", high)


def is_number(limit: Any) -> bool:
    """It is known when the graph is made, and no other node's result."""
    return isinstance(limit, (int, float))
