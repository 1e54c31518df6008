"""What the host's quantizer goes by: every convolution, and nothing else, as what a convolution module was exported to.

The host's quantizer goes by the module that an operator came from, and takes all that came from a convolution module for
convolutions. One that pads by reflection, periodically or with the border's values holds a padding too, at which it raises.
Where the export does not tell what operators came from (not strict, the host's second try), the host goes by the modules around
them. A padding that was rewritten has no such module, and would tear one apart, so convolutions are named there too.

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
}
NAMES = {f"{module.__module__}.{module.__qualname__}" for module in MODULES.values()}
SOURCE = "source_fn_stack"  # what the host goes by: pairs of a name and the module or function


def name_origins(graph_module: fx.GraphModule) -> None:
    """Name a module for convolutions that have none, and none for what the host takes for something else, in place."""
    for node in graph_module.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in MODULES:
            node.meta.setdefault(SOURCE, [(node.name, MODULES[node.target])])
        elif _is_of_convolution(node) or _adds_a_number(node):
            node.meta[SOURCE] = [(node.name, node.target)]


def _adds_a_number(node: fx.Node) -> bool:
    return node.target in ADDITIONS and not all(_is_tensor(term) for term in node.args[:2])


def _is_tensor(term: Any) -> bool:
    return isinstance(term, fx.Node) and isinstance(term.meta.get("val"), torch.Tensor)


def _is_of_convolution(node: fx.Node) -> bool:
    if node.meta.get(SOURCE):
        return node.meta[SOURCE][-1][1] in MODULES.values()
    around = list((node.meta.get("nn_module_stack") or {}).values())
    return bool(around) and around[-1][1] in NAMES
