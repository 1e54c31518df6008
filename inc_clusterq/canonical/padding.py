"""Padding that was given as a word, in numbers.

`padding="same"` and `padding="valid"` are exported to an overload of their own, at which the host's quantizer raises.
"same" pads dilation * (kernel size - 1) values in all; where that is odd, the one more stands at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.nn import functional

from inc_clusterq.nodes import named_arguments

aten = torch.ops.aten
IN_NUMBERS = {
    aten.conv1d.padding: aten.conv1d.default,
    aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.padding: aten.conv3d.default,
}


def write_padding_as_numbers(graph_module: fx.GraphModule) -> int:
    """Rewrite the convolutions whose padding is a word, in place; returns how many there were."""
    graph = graph_module.graph
    worded = [node for node in graph.nodes if node.target in IN_NUMBERS]
    for node in worded:
        x, weight, bias, stride, padding, dilation, groups = named_arguments(node).values()
        sizes = weight.meta["val"].shape[2:]
        steps = [*dilation] * (len(sizes) // len(dilation))
        totals = [step * (size - 1) if padding == "same" else 0 for step, size in zip(steps, sizes, strict=True)]
        if any(total % 2 for total in totals):
            with graph.inserting_before(node):
                x = _padded_at_the_end(graph, x, [total % 2 for total in totals])
        node.target = IN_NUMBERS[node.target]
        node.args, node.kwargs = (x, weight, bias, stride, [total // 2 for total in totals], dilation, groups), {}
    if worded:
        graph_module.recompile()
    return len(worded)


def _padded_at_the_end(graph: fx.Graph, x: fx.Node, more: list[int]) -> fx.Node:
    widths = [width for end in reversed(more) for width in (0, end)]  # the last axis first
    padded = graph.call_function(aten.pad.default, (x, widths))
    value: Tensor = x.meta["val"]
    padded.meta = {"val": functional.pad(value, widths)}
    return padded
