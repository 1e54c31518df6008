"""Rewrites pools with `ceil_mode`, of which 8-bit kernels make something else, and nothing says so.

Inductor's max pool leaves the last row and column out, so that the compiled model works on smaller feature maps than the
evaluated one. A max pool that rounds its size up is the one that rounds down, on a feature map with rows and columns more of
the lowest level, which no maximum takes.

ONNX Runtime's and OpenVINO's average pools divide the last windows by positions that PyTorch does not count: those that
rounding up adds. Where only positions of the feature map are counted, all agree. Padding counts as well in PyTorch, by default,
so it becomes part of the feature map, as rows and columns of the level of zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from inc_clusterq.deployment.backend import DEQUANTIZE

aten = torch.ops.aten
CEIL_MODE: dict[Any, int] = {aten.max_pool2d.default: 5, aten.avg_pool2d.default: 4}  # its place among the arguments


def write_ceil_mode(graph_module: fx.GraphModule) -> int:
    """Make explicit what `ceil_mode` adds and what averages count, in front of 8-bit pools; returns how many pools it was."""
    graph = graph_module.graph
    pools = [node for node in graph.nodes if node.target in CEIL_MODE and _rounds_up(node)]
    for pool in pools:
        if pool.target is aten.max_pool2d.default:
            padding = _missing(pool)
            pool.args = (pool.args[0], *pool.args[1:5])
            _pad(graph, pool, padding, lowest=True)
        else:
            _count_map_alone(graph, pool)
    graph_module.recompile()
    return len(pools)


def _rounds_up(pool: fx.Node) -> bool:
    source, place = pool.args[0], CEIL_MODE[pool.target]
    return len(pool.args) > place and bool(pool.args[place]) and isinstance(source, fx.Node) and source.target is DEQUANTIZE


def _count_map_alone(graph: fx.Graph, pool: fx.Node) -> None:
    source, kernel, stride, padding, ceil_mode, counts_padding, divisor = (*pool.args, True, None)[:7]
    if divisor is not None or not counts_padding:
        return
    rows, columns = _pair(padding)
    pool.args = (source, kernel, stride, [0, 0], ceil_mode, False)
    _pad(graph, pool, [columns, columns, rows, rows], lowest=False)


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


def _pad(graph: fx.Graph, pool: fx.Node, padding: list[int], *, lowest: bool) -> None:
    """Pad the integers that a pool reads with their lowest level, or that of zero."""
    if not any(padding):
        return
    dequantize = pool.args[0]
    assert isinstance(dequantize, fx.Node)
    integers, *quantization = dequantize.args
    level = quantization[2 if lowest else 1]
    with graph.inserting_before(pool):
        padded = graph.call_function(aten.constant_pad_nd.default, (integers, padding, level))
        again = graph.call_function(DEQUANTIZE, (padded, *quantization))
    assert isinstance(integers, fx.Node)
    for new, old in ((padded, integers), (again, dequantize)):
        new.meta.update(old.meta)
        new.meta["val"] = aten.constant_pad_nd.default(old.meta["val"], padding, level)
    pool.replace_input_with(dequantize, again)


def _shape(node: fx.Node) -> torch.Size:
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value.shape


def _pair(value: Any) -> list[int]:
    return list(value) if len(value) == 2 else [value[0], value[0]]
