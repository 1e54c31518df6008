"""Rewrites max pools with `ceil_mode`, which Inductor's 8-bit max pool does not know: it leaves the last row and column out.

The compiled model then works on smaller feature maps than the evaluated one, and nothing says so. A pool that rounds its
size up is the one that rounds down, on a feature map with rows and columns more of the lowest level, which no maximum takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from inc_clusterq.deployment.backend import DEQUANTIZE

aten = torch.ops.aten


def write_ceil_mode(graph_module: fx.GraphModule) -> int:
    """Make the rows and columns that `ceil_mode` adds explicit, in front of 8-bit max pools; returns how many pools it was."""
    pools = [node for node in graph_module.graph.nodes if node.target is aten.max_pool2d.default and _rounds_up(node)]
    for pool in pools:
        padding = _missing(pool)
        pool.args = (pool.args[0], *pool.args[1:5])
        if any(padding):
            _pad(graph_module.graph, pool, padding)
    graph_module.recompile()
    return len(pools)


def _rounds_up(pool: fx.Node) -> bool:
    source = pool.args[0]
    return len(pool.args) == 6 and bool(pool.args[5]) and isinstance(source, fx.Node) and source.target is DEQUANTIZE


def _missing(pool: fx.Node) -> list[int]:
    """Columns at the left and the right, rows at the top and the bottom, that the last windows lack."""
    source, kernel, stride, padding, dilation, _ = pool.args
    assert isinstance(source, fx.Node)
    lengths: list[int] = []
    for axis in (0, 1):
        before, after = (int(_shape(node)[2 + axis]) for node in (source, pool))
        k, s, p, d = (int(_pair(value)[axis]) for value in (kernel, stride or kernel, padding, dilation))
        lengths.append(max((after - 1) * s + d * (k - 1) + 1 - before - 2 * p, 0))
    return [0, lengths[1], 0, lengths[0]]


def _pad(graph: fx.Graph, pool: fx.Node, padding: list[int]) -> None:
    dequantize = pool.args[0]
    assert isinstance(dequantize, fx.Node)
    integers, *quantization = dequantize.args
    lowest = quantization[2]
    with graph.inserting_before(pool):
        padded = graph.call_function(aten.constant_pad_nd.default, (integers, padding, lowest))
        again = graph.call_function(DEQUANTIZE, (padded, *quantization))
    assert isinstance(integers, fx.Node)
    for new, old in ((padded, integers), (again, dequantize)):
        new.meta.update(old.meta)
        new.meta["val"] = aten.constant_pad_nd.default(old.meta["val"], padding, lowest)
    pool.replace_input_with(dequantize, again)


def _shape(node: fx.Node) -> torch.Size:
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value.shape


def _pair(value: Any) -> list[int]:
    return list(value) if len(value) == 2 else [value[0], value[0]]
