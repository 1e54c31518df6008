"""Rewrites the explicit clamps of activations below 8 bits so that Inductor keeps their convolutions in one int8 kernel.

A kernel's epilogue takes `hardtanh` and `relu`, not `clamp`; a clamp in front of a quantize node therefore makes the kernel
write float32, and costs two passes over that. Behind a convolution or linear operator, with or without ReLU or ReLU6, the
clamp becomes one hardtanh(low, high) with the tighter of the limits. Behind a residual addition the epilogue takes `relu`
alone; there, and wherever else, the clamp moves behind the quantize node. Rounding is monotone, so

    Q(min(x, high)) = min(Q(x), Q(high))

to the bit, and the pass that is left is over bytes. OpenVINO sees a quantization only where quantize and dequantize nodes
are neighbours, and is given the clamps where they were (`clamp_before_quantize`).

Moving the integers to the top of uint8, so that the saturation at 255 is the clamp, was tried: it fuses, but the next
convolution then pads with a zero point that is not 0, which costs more than it gains.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from inc_clusterq.deployment.backend import QUANTIZE, STORED_MAX
from inc_clusterq.nodes import is_number, limits_of

aten = torch.ops.aten
MULTIPLIES = {aten.conv2d.default, aten.conv3d.default, aten.linear.default}  # the kernel over one axis takes ReLU alone
RELUS = {aten.relu.default}
HARDTANHS = {aten.hardtanh.default}


def fuse_clamps(graph_module: fx.GraphModule) -> int:
    """Rewrite the clamps in front of quantize nodes; returns how many of them take a pass of their own, over integers.

    A clamp of the user's with one limit, or with limits that the quantization does not have, is left as it is.
    """
    left = 0
    for clamp in [node for node in graph_module.graph.nodes if node.target is aten.clamp.default]:
        quantize = next(iter(clamp.users))
        if len(clamp.users) != 1 or quantize.target is not QUANTIZE or not all(is_number(limit) for limit in limits_of(clamp)):
            continue
        if not _into_hardtanh(graph_module.graph, clamp):
            left += _onto_integers(graph_module.graph, clamp, quantize)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return left


def clamp_before_quantize(graph_module: fx.GraphModule) -> None:
    """Put clamps of integers back in front of their quantize nodes."""
    graph = graph_module.graph
    for clamp in [node for node in graph.nodes if node.target is aten.clamp.default]:
        quantize: Any = clamp.args[0]
        if quantize.target is not QUANTIZE:
            continue
        x, scale, zero_point, *_ = quantize.args
        with graph.inserting_before(quantize):
            limits = ((level - zero_point) * scale for level in (0, clamp.args[2]))
            before = graph.call_function(aten.clamp.default, (x, *limits))
        before.meta.update(x.meta)
        quantize.replace_input_with(x, before)
        clamp.replace_all_uses_with(quantize)
        graph.erase_node(clamp)
    graph_module.recompile()


def _onto_integers(graph: fx.Graph, clamp: fx.Node, quantize: fx.Node) -> bool:
    limits: Any = limits_of(clamp)
    quantization: Any = quantize.args[1:]
    scale, zero_point, *_ = quantization
    bottom, top = (round(limit / scale) + zero_point for limit in limits)
    if bottom != 0 or top > STORED_MAX or limits != ((bottom - zero_point) * scale, (top - zero_point) * scale):
        return False
    quantize.args = (clamp.args[0], *quantization)
    users = list(quantize.users)
    with graph.inserting_after(quantize):
        levels = graph.call_function(aten.clamp.default, (quantize, None, top))
    levels.meta.update(quantize.meta)
    for user in users:
        user.replace_input_with(quantize, levels)
    return True


def _into_hardtanh(graph: fx.Graph, clamp: fx.Node) -> bool:
    x, (low, high) = clamp.args[0], limits_of(clamp)
    assert isinstance(x, fx.Node)
    limits = _limits(x)
    if limits is not None:
        if len(x.users) != 1 or not isinstance(x.args[0], fx.Node):
            return False
        # max(a, low) and min(b, high) commute only while the intervals overlap; here both hold 0.
        low, high = max(low, limits[0]), min(high, limits[1])
        x = x.args[0]
    if x.target not in MULTIPLIES or len(x.users) != 1 or low > high:
        return False
    with graph.inserting_before(clamp):
        hardtanh = graph.call_function(aten.hardtanh.default, (x, low, high))
    hardtanh.meta.update(clamp.meta)
    clamp.replace_all_uses_with(hardtanh)
    return True


def _limits(node: fx.Node) -> tuple[float, float] | None:
    """Interval that an activation function cuts to; None for anything else."""
    if node.target in RELUS:
        return 0.0, float("inf")
    if node.target in HARDTANHS:
        bounds: Any = [*node.args[1:], *[-1.0, 1.0][len(node.args) - 1 :]]
        return float(bounds[0]), float(bounds[1])
    return None
