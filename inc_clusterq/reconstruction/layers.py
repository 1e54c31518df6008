"""Convolutions and linear operators of the host's prepared graph, as the layers that the user wrote."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from inc_clusterq.attributes import attribute
from inc_clusterq.nodes import is_observer, named_arguments

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


def read_layer(graph_module: fx.GraphModule, node: fx.Node) -> Layer:
    """The layer whose operator is `node`, one of WEIGHTED."""
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


def has_weight(node: fx.Node, active: set[fx.Node]) -> bool:
    """Whether a weighted operator has a weight of the network's own; `active` are the nodes that depend on the input."""
    weight = node.args[WEIGHTED[node.target]]
    return isinstance(weight, fx.Node) and weight not in active


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
