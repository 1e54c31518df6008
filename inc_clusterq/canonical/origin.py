"""What the host's quantizer goes by: convolutions, linear operators and activation functions as what modules are exported to.

The host's quantizer goes by the module that an operator came from, and takes all that came from a convolution module for
convolutions. One that pads by reflection, periodically or with the border's values holds a padding too, at which it raises.
Where the export does not tell what operators came from (not strict, the host's second try), the host goes by the modules around
them. A padding that was rewritten has no such module, and would tear one apart, and a class derived from `nn.Linear` is not
known, so convolutions and linear operators are named there too.

Activation functions it knows by their modules, and few of them by a function too: a pool behind `torch.relu` or
`functional.silu` would stay in float. A module that is called twice is one with two outputs where the export is not strict, at
which the host raises. So each call is named a module of its own.

Behind a convolution or a linear operator it takes every addition for that of two feature maps, and raises at a number, such as
the 3 of a hand-written hard sigmoid. Additions of numbers are none to it if they come from no function that it knows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

aten = torch.ops.aten
ADDITIONS = {aten.add.Tensor, aten.add_.Tensor}
MODULES: dict[Any, type[nn.Module]] = {
    aten.conv1d.default: nn.Conv1d,
    aten.conv2d.default: nn.Conv2d,
    aten.conv3d.default: nn.Conv3d,
    aten.linear.default: nn.Linear,
}
ACTIVATIONS: dict[Any, type[nn.Module]] = {
    aten.relu.default: nn.ReLU,
    aten.relu_.default: nn.ReLU,
    aten.hardtanh.default: nn.Hardtanh,
    aten.hardtanh_.default: nn.Hardtanh,
    aten.hardswish.default: nn.Hardswish,
    aten.hardswish_.default: nn.Hardswish,
    aten.silu.default: nn.SiLU,
    aten.silu_.default: nn.SiLU,
    aten.leaky_relu.default: nn.LeakyReLU,
    aten.leaky_relu_.default: nn.LeakyReLU,
    aten.tanh.default: nn.Tanh,
    aten.tanh_.default: nn.Tanh,
    aten.gelu.default: nn.GELU,
}
NAMES = {f"{module.__module__}.{module.__qualname__}" for module in MODULES.values()}
SOURCE = "source_fn_stack"  # what the host goes by: pairs of a name and the module or function


def name_origins(graph_module: fx.GraphModule) -> None:
    """Name a module for layers that have none and for activation functions, and none for what the host takes for another."""
    for node in graph_module.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in MODULES:
            node.meta.setdefault(SOURCE, [(node.name, MODULES[node.target])])
        elif node.target in ACTIVATIONS:
            node.meta[SOURCE] = [(node.name, ACTIVATIONS[node.target])]
        elif _is_within_layer(node) or _adds_a_number(node):
            node.meta[SOURCE] = [(node.name, node.target)]


def _adds_a_number(node: fx.Node) -> bool:
    return node.target in ADDITIONS and not all(_is_tensor(term) for term in node.args[:2])


def _is_tensor(term: Any) -> bool:
    return isinstance(term, fx.Node) and isinstance(term.meta.get("val"), torch.Tensor)


def _is_within_layer(node: fx.Node) -> bool:
    if node.meta.get(SOURCE):
        return node.meta[SOURCE][-1][1] in MODULES.values()
    around = list((node.meta.get("nn_module_stack") or {}).values())
    return bool(around) and around[-1][1] in NAMES
