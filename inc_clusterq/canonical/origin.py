"""Padding inside a convolution module as an operator of its own.

The host's quantizer goes by the module that an operator came from, and takes all that came from a convolution module for
convolutions. One that pads by reflection, periodically or with the border's values holds a padding too, at which it raises.
"""

from __future__ import annotations

import torch
from torch import fx, nn

aten = torch.ops.aten
MODULES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default}
SOURCE = "source_fn_stack"  # what the host goes by: pairs of a name and the module or function


def name_origins(graph_module: fx.GraphModule) -> None:
    """Name the operator itself as the origin of what a convolution module holds besides its convolution, in place."""
    for node in graph_module.graph.nodes:
        if node.op != "call_function" or node.target in CONVOLUTIONS or not node.meta.get(SOURCE):
            continue
        _, source = node.meta[SOURCE][-1]
        if source in MODULES:
            node.meta[SOURCE] = [(node.name, node.target)]  # without any, the host would go by the module around it
