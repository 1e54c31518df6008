"""Reconstruction units, cut from the host's prepared graph where a single activation tensor crosses.

The graph that the host prepares for PT2E has BatchNorm folded and an observer at every place where the deployed graph
quantizes. Nodes that depend on the input are walked in order; after a node where no other tensor is still needed, all
that follows depends on that one tensor, and the graph can be cut there: residual, dense, split and squeeze-excite
structures end up whole inside a unit without a rule for any of them. A cut falls before a quantizer, never behind it:
a shortcut may read the unquantized tensor, and a unit's target is the activation function's output. What crosses has an image
per row: where frames are folded into the batch, or another axis comes first, the graph stays whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from inc_clusterq.attributes import attribute

aten = torch.ops.aten
WEIGHTED: dict[Any, int] = {  # operator -> position of its weight argument
    aten.conv1d.default: 1,
    aten.conv2d.default: 1,
    aten.conv3d.default: 1,
    aten.conv_transpose1d.default: 1,
    aten.conv_transpose2d.input: 1,
    aten.conv_transpose3d.input: 1,
    aten.linear.default: 1,
}
# Activation functions: a cut before one would make a target that the function then distorts (MRECG code: target after it).
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
    aten.batch_norm.default,
    aten.dropout.default,
    aten.dropout_.default,
}
ORDERED = {aten.view.default, aten.view_as.default, aten.as_strided.default}  # they ask how their input lies in memory


@dataclass(frozen=True)
class Layer:
    """One convolution or linear operator of the graph."""

    name: str  # module that the user wrote, e.g. layer1.0.conv1
    weight: str  # attribute that holds the folded weight
    node: str  # node of the operator
    quantizer: str | None  # attribute of the weight's observer; None: the host leaves this weight in float
    kind: str  # "dense", "depthwise", "grouped" or "linear"
    stride: int
    dilation: int
    shape: tuple[int, ...]
    bias: str | None = None  # attribute that holds the bias
    groups: int = 1

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return int(torch.Size(self.shape).numel())


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


def is_observer(node: fx.Node) -> bool:
    """The node is a quantizer's place: a module that the host has put there."""
    return node.op == "call_module" and str(node.target).startswith("activation_post_process")


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


def _may_end_here(node: fx.Node, active: set[fx.Node]) -> bool:
    value = node.meta.get("val")
    if is_observer(node) or not (isinstance(value, Tensor) and value.is_floating_point()):
        return False
    users = [user for user in node.users if user in active]
    return not any(user.target in ACTIVATIONS for user in users)


def _with_weights(
    graph_module: fx.GraphModule, first: fx.Node, segments: list[list[fx.Node]], active: set[fx.Node]
) -> list[Unit]:
    """Segments without a weighted operator (pooling, flattening) join the next one; at the end, the last one."""
    units: list[Unit] = []
    pending: list[fx.Node] = []
    start = first
    for segment in segments:
        nodes = pending + segment
        layers = tuple(_layer(graph_module, node) for node in nodes if node.target in WEIGHTED and _has_weight(node, active))
        if not layers:
            pending = nodes
            continue
        units.append(Unit(start.name, tuple(node.name for node in nodes), layers, _longest_path(nodes, layers)))
        pending, start = [], nodes[-1]
    if pending and units:
        last = units[-1]
        units[-1] = Unit(last.start, last.nodes + tuple(node.name for node in pending), last.layers, last.path)
    return units


def _has_weight(node: fx.Node, active: set[fx.Node]) -> bool:
    weight = node.args[WEIGHTED[node.target]]
    return isinstance(weight, fx.Node) and weight not in active


def _layer(graph_module: fx.GraphModule, node: fx.Node) -> Layer:
    weight = node.args[WEIGHTED[node.target]]
    assert isinstance(weight, fx.Node)
    quantizer = str(weight.target) if is_observer(weight) else None
    while weight.op != "get_attr":
        weight = weight.all_input_nodes[0]
    tensor = attribute(graph_module, str(weight.target))
    stack = node.meta.get("nn_module_stack") or {}
    path = [str(entry[0]) for entry in stack.values()]
    written = next((name for name in reversed(path) if name), node.name)
    stride, dilation, groups = _hyper_parameters(node)
    kind = "linear" if node.target is aten.linear.default else _convolution_kind(groups, tensor)
    bias = node.args[2] if len(node.args) > 2 else None
    return Layer(
        _plain(written),
        str(weight.target),
        node.name,
        quantizer,
        kind,
        stride,
        dilation,
        tuple(tensor.shape),
        str(bias.target) if isinstance(bias, fx.Node) and bias.op == "get_attr" else None,
        groups,
    )


def _plain(name: str) -> str:
    """Module path as the user wrote it: non-strict export prefixes it with the root's alias."""
    for prefix in ("L['self'].", "L__self___"):
        name = name.removeprefix(prefix)
    return name


def _convolution_kind(groups: int, weight: Tensor) -> str:
    if groups == 1:
        return "dense"
    return "depthwise" if weight.shape[1] == 1 else "grouped"


def _hyper_parameters(node: fx.Node) -> tuple[int, int, int]:
    """Largest stride, largest dilation and groups of a convolution; ones for a linear operator."""
    if node.target is aten.linear.default:
        return 1, 1, 1
    named = named_arguments(node)

    def largest(value: Any) -> int:
        return int(max(value)) if isinstance(value, (list, tuple)) else int(value)

    return largest(named["stride"]), largest(named["dilation"]), int(named["groups"])


def named_arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of an operator by name, defaults included."""
    named: dict[str, Any] = {}
    for position, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        default = argument.default_value
        named[argument.name] = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name, default)
    return named


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
