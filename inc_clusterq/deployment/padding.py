"""Quantizes in front of zero padding instead of behind it, so that the quantize node ends up inside a convolution's kernel.

Networks that pad at the bottom and the right alone, as TensorFlow does, have a padding of its own between an activation and
the next convolution. The convolution in front of it then writes float32, and padding and quantizing take passes over that.
Zero is a level of its own in every quantization here, so that

    Q(clamp(pad(x, 0))) = pad(Q(clamp(x)), zero point)

to the bit, and what is padded is a quarter of the size. Padding behind anything else, such as the shortcuts of ResNet-20, is
left alone: there it would only split one loop in two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from inc_clusterq.deployment.arithmetic import EPILOGUES, PRODUCTS
from inc_clusterq.deployment.backend import QUANTIZE
from inc_clusterq.nodes import limits_of

aten = torch.ops.aten


def quantize_before_padding(graph_module: fx.GraphModule) -> int:
    """Exchange zero padding and the quantize node that is its only reader; returns how often."""
    graph = graph_module.graph
    count = 0
    for quantize in [node for node in graph.nodes if node.target is QUANTIZE]:
        value, *quantization = quantize.args
        clamp = value if value.target is aten.clamp.default and len(value.users) == 1 else None
        pad = clamp.args[0] if clamp is not None else value
        if not _pads_with_zero(pad) or len(pad.users) != 1 or not _ends_kernel(pad.args[0]):
            continue
        if clamp is not None and not _keeps_zero(clamp):
            continue
        source = pad.args[0]
        with graph.inserting_before(quantize):
            if clamp is not None:
                source = _like(clamp, graph.call_function(clamp.target, (source, *clamp.args[1:]), dict(clamp.kwargs)))
            levels = _like(quantize, graph.call_function(QUANTIZE, (source, *quantization)))
            padded = _like(quantize, graph.call_function(aten.constant_pad_nd.default, (levels, pad.args[1], quantization[1])))
        quantize.replace_all_uses_with(padded)
        count += 1
    graph.eliminate_dead_code()
    graph_module.recompile()
    return count


def _pads_with_zero(node: Any) -> bool:
    if not isinstance(node, fx.Node) or node.kwargs:
        return False
    if node.target is aten.constant_pad_nd.default:
        return not any(node.args[2:])
    return node.target is aten.pad.default and node.args[2:3] in ((), ("constant",)) and not any(node.args[3:])


def _keeps_zero(clamp: fx.Node) -> bool:
    low, high = limits_of(clamp)
    return not isinstance(low, fx.Node) and not isinstance(high, fx.Node) and (low or 0) <= 0 <= (high or 0)


def _ends_kernel(node: fx.Node) -> bool:
    """Whether a convolution or linear operator, with its activation, computes the node and nothing else reads it."""
    product = node.args[0] if node.target in EPILOGUES else node
    return isinstance(product, fx.Node) and product.target in PRODUCTS and len(node.users) == len(product.users) == 1


def _like(old: fx.Node, new: fx.Node) -> fx.Node:
    new.meta.update({key: value for key, value in old.meta.items() if key != "val"})
    return new
