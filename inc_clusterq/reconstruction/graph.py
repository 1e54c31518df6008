"""Reconstruction units, cut from the host's prepared graph where a single activation tensor crosses.

The graph that the host prepares for PT2E has BatchNorm folded and an observer at every place where the deployed graph
quantizes. Nodes that depend on the input are walked in order; after a node where no other tensor is still needed, all
that follows depends on that one tensor, and the graph can be cut there: residual, dense, split and squeeze-excite
structures end up whole inside a unit without a rule for any of them. A cut falls before a quantizer, never behind it:
a shortcut may read the unquantized tensor, and a unit's target is the activation function's output. What crosses has an image
per row: where frames are folded into the batch, or another axis comes first, the graph stays whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from inc_clusterq.nodes import active_nodes, first_axis, is_observer
from inc_clusterq.reconstruction.layers import WEIGHTED, Layer, has_weight, read_layer

aten = torch.ops.aten
# Activation functions and norms: a cut before one would make a target that it then distorts (MRECG code: target after it).
ACTIVATIONS = {
    aten.relu.default,
    aten.relu_.default,
    aten.relu6.default,
    aten.relu6_.default,
    aten.hardtanh.default,
    aten.hardtanh_.default,
    aten.hardswish.default,
    aten.hardswish_.default,
    aten.hardsigmoid.default,
    aten.hardsigmoid_.default,
    aten.silu.default,
    aten.silu_.default,
    aten.gelu.default,
    aten.leaky_relu.default,
    aten.leaky_relu_.default,
    aten.elu.default,
    aten.elu_.default,
    aten.celu.default,
    aten.celu_.default,
    aten.selu.default,
    aten.selu_.default,
    aten.prelu.default,
    aten.softplus.default,
    aten.tanh.default,
    aten.tanh_.default,
    aten.sigmoid.default,
    aten.mish.default,
    aten.mish_.default,
    aten.clamp.default,
    aten.clamp_.default,
    aten.clamp_min.default,
    aten.clamp_min_.default,
    aten.clamp_max.default,
    aten.clamp_max_.default,
    aten.batch_norm.default,
    aten.group_norm.default,
    aten.instance_norm.default,
    aten.dropout.default,
    aten.dropout_.default,
}
ORDERED = {aten.view.default, aten.view_as.default, aten.as_strided.default}  # they ask how their input lies in memory


@dataclass(frozen=True)
class Unit:
    """A run of nodes with one input tensor and one output tensor."""

    start: str  # node whose output is the unit's input
    nodes: tuple[str, ...]
    layers: tuple[Layer, ...]
    path: tuple[str, ...]  # names of the layers on the longest chain through the unit: its topology

    @property
    def name(self) -> str:
        """Names of its first and last layer."""
        return " .. ".join(dict.fromkeys((self.layers[0].name, self.layers[-1].name)))

    @property
    def end(self) -> str:
        """Node whose output is the unit's output."""
        return self.nodes[-1]

    @property
    def branching(self) -> bool:
        """Holds more than a plain chain of layers."""
        return len(self.layers) != 1


def join(units: tuple[Unit, ...] | list[Unit]) -> Unit:
    """Adjacent units as one."""
    return Unit(
        start=units[0].start,
        nodes=tuple(node for unit in units for node in unit.nodes),
        layers=tuple(layer for unit in units for layer in unit.layers),
        path=tuple(name for unit in units for name in unit.path),
    )


def partition(graph_module: fx.GraphModule) -> list[Unit]:
    """Smallest units: each holds at least one weighted operator, and all of them together hold the whole graph.

    The graph must have one tensor input. Its observers may still be the host's.
    """
    active = active_nodes(graph_module)
    order = [node for node in graph_module.graph.nodes if node in active]
    rank = {node: position for position, node in enumerate(order)}
    last_use = {node: max((rank[user] for user in node.users), default=rank[node]) for node in order}
    segments: list[list[fx.Node]] = []
    begin, alive_until = 1, -1
    for position, node in enumerate(order[:-1]):  # the last active node is the output
        crossing = alive_until > position
        alive_until = max(alive_until, last_use[node])
        if position == 0 or crossing or not _may_end_here(node, active) or first_axis(node) != first_axis(order[0]):
            continue
        segments.append(order[begin : position + 1])
        begin = position + 1
    if begin < len(order) - 1:
        segments.append(order[begin:-1])
    return _with_weights(graph_module, order[0], segments, active)


def extract(graph_module: fx.GraphModule, unit: Unit, input_of: str | None = None) -> fx.GraphModule:
    """The unit as a module of its own; parameters and quantizers are shared with `graph_module`.

    It takes inputs that lie in memory in any order. With the node of one of its layers as `input_of` only what leads to that
    layer's input, which is then the output.
    """
    source = {node.name: node for node in graph_module.graph.nodes}
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {source[unit.start]: graph.placeholder("x")}

    def copy(node: fx.Node) -> fx.Node:
        if node not in copies:
            for argument in node.all_input_nodes:
                copy(argument)
            copies[node] = made = graph.node_copy(node, lambda argument: copies[argument])
            if node.target in ORDERED:
                with graph.inserting_before(made):
                    made.update_arg(0, graph.call_function(aten.contiguous.default, (made.args[0],)))
        return copies[node]

    if input_of is None:
        for name in unit.nodes:
            copy(source[name])
        end = source[unit.end]
    else:
        end = source[input_of].all_input_nodes[0]
    graph.output(copy(end))
    return fx.GraphModule(graph_module, graph)


def _may_end_here(node: fx.Node, active: set[fx.Node]) -> bool:
    value = node.meta.get("val")
    if is_observer(node) or not (isinstance(value, Tensor) and value.is_floating_point()):
        return False
    return not any(user in active and user.target in ACTIVATIONS for user in _readers(node))


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """What reads a node's values, or a copy of them."""
    for user in node.users:
        if user.target is aten.clone.default:
            yield from _readers(user)
        else:
            yield user


def _with_weights(
    graph_module: fx.GraphModule, first: fx.Node, segments: list[list[fx.Node]], active: set[fx.Node]
) -> list[Unit]:
    """Segments without a weighted operator (pooling, flattening) join the next one; at the end, the last one."""
    units: list[Unit] = []
    pending: list[fx.Node] = []
    start = first
    for segment in segments:
        nodes = pending + segment
        layers = tuple(read_layer(graph_module, node) for node in nodes if node.target in WEIGHTED and has_weight(node, active))
        if not layers:
            pending = nodes
            continue
        units.append(Unit(start.name, tuple(node.name for node in nodes), layers, _longest_path(nodes, layers)))
        pending, start = [], nodes[-1]
    if pending and units:
        last = units[-1]
        units[-1] = Unit(last.start, last.nodes + tuple(node.name for node in pending), last.layers, last.path)
    return units


def _longest_path(nodes: list[fx.Node], layers: tuple[Layer, ...]) -> tuple[str, ...]:
    by_node = {layer.node: layer.name for layer in layers}
    longest: dict[fx.Node, tuple[str, ...]] = {}
    for node in nodes:
        before = max((longest.get(argument, ()) for argument in node.all_input_nodes), key=len, default=())
        longest[node] = (*before, by_node[node.name]) if node.name in by_node else before
    return max(longest.values(), key=len)


def replace_observers(graph_module: fx.GraphModule, make: Callable[[str], nn.Module]) -> None:
    """Put `make(name)` in the place of every observer; observers that were shared stay shared."""
    made: dict[int, nn.Module] = {}
    for node in graph_module.graph.nodes:
        if is_observer(node):
            name = str(node.target)
            old = id(getattr(graph_module, name))
            if old not in made:
                made[old] = make(name)
            setattr(graph_module, name, made[old])
