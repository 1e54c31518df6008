"""Rewrites an exported quantize-dequantize ONNX graph so that plain ONNX Runtime runs every convolution in int8.

ONNX Runtime (CPU) fuses a convolution into its int8 kernel only between a dequantize and a quantize node, with an int32
bias. What stands in the way, and what is done about it; each step leaves the numbers as they are unless it says so:

  * A clamp between convolution and quantize node (ReLU6, or the explicit clamp of activations below 8 bits) blocks the
    fusion. Rounding is monotone, so it moves behind the quantize node as a clip of the integers:
        Q(clip(x, lo, hi)) = clip(Q(x), Q(lo), Q(hi)) .
  * A convolution that feeds an addition or another function has no quantize node behind it, and an additional one would
    round what the evaluated model does not. It becomes a matrix product over gathered 8-bit patches,
        y = W x + b,  x: (N, H' W', K K C) uint8,  W: int8 ,
    which ONNX Runtime computes in int8 with a float result, exactly as the evaluated model. Grouped ones stay in float.
  * Linear operators take the same form, for the same reason: their float bias needs no rounding.
  * The bias of the other convolutions becomes an integer, the only rounding that is added (`onnx_bias.py`). Below 8 bits it
    changes no level; where that is not possible, a dense convolution takes the form of a matrix product too.
  * A mean over the image becomes a global pooling, which has an int8 kernel.
  * Levels that are rounded once more to those of another scale keep that rounding. ONNX Runtime would take it out, which
    changes numbers, and leaves the operator behind it with a bias of the wrong scale, for which there is no kernel: a maximum
    with the least number, between the two, stops it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, numpy_helper

from inc_clusterq.deployment.backend import STORED_MAX
from inc_clusterq.deployment.onnx_bias import (
    FULL_LEVELS,
    IntegerBias,
    Operands,
    integer_bias,
    levels_of,
    operands_of,
    sums_scale,
)
from inc_clusterq.deployment.onnx_graph import Array, Graph, attribute


def rewrite(model: ModelProto) -> ModelProto:
    """`model`, changed in place; see the module's text."""
    graph = Graph.of(model)
    _pool_globally(graph)
    _clip_integers(graph)
    _multiply_integers(graph)
    _keep_both_roundings(graph)
    used = {name for node in model.graph.node for name in node.input}
    del model.graph.initializer[:]
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value, order="C"), name) for name, value in graph.constants.items() if name in used
    )
    del model.graph.value_info[:]
    return model


def _keep_both_roundings(graph: Graph) -> None:
    for node in graph.model.graph.node:
        before = graph.producer.get(node.input[0]) if node.op_type == "QuantizeLinear" else None
        if before is not None and before.op_type == "DequantizeLinear" and not _same_levels(graph, before, node):
            least = graph.constant("least", np.full((), np.finfo(np.float32).min, np.float32))
            node.input[0] = graph.add("Max", [node.input[0], least], f"{node.output[0]}.real", f"{node.name}.keep")
        graph.nodes.append(node)
    graph.commit()


def _same_levels(graph: Graph, first: NodeProto, second: NodeProto) -> bool:
    levels = ([graph.constants[name] for name in node.input[1:3]] for node in (first, second))
    return all(map(np.array_equal, *levels))


def _clip_integers(graph: Graph) -> None:
    """Move clamps and ReLUs from in front of quantize nodes to behind them."""
    for node in graph.model.graph.node:
        if node.op_type != "QuantizeLinear" or node.input[0] not in graph.producer:
            graph.nodes.append(node)
            continue
        scale, zero = graph.constants[node.input[1]], graph.constants[node.input[2]]
        low, high = 0, STORED_MAX
        source = node.input[0]
        while source in graph.producer and graph.producer[source].op_type in ("Relu", "Clip"):
            before = graph.producer[source]
            bounds = _bounds(graph, before)
            if bounds is None:
                break
            levels = [int(np.clip(np.rint(bound / scale) + int(zero), 0, STORED_MAX)) for bound in bounds]
            # The clamp that was nearest to the quantize node came last, and holds against the ones before it.
            low, high = (min(max(low, levels[0]), high), max(min(high, levels[1]), low))
            source = before.input[0]
        if source == node.input[0] or zero.dtype != np.uint8:
            graph.nodes.append(node)
            continue
        clipped = (low, high) != (0, STORED_MAX)
        levels_name = f"{node.output[0]}.levels" if clipped else node.output[0]
        graph.add("QuantizeLinear", [source, node.input[1], node.input[2]], levels_name, node.name)
        if clipped:
            limits = [graph.constant(f"level_{level}", np.uint8(level) * np.ones((), np.uint8)) for level in (low, high)]
            graph.add("Clip", [levels_name, *limits], node.output[0], f"{node.name}.clip")
    graph.commit()


def _bounds(graph: Graph, node: NodeProto) -> tuple[float, float] | None:
    """Lower and upper limit of a ReLU or clip; None where they are not constants."""
    if node.op_type == "Relu":
        return 0.0, float("inf")
    limits = [-float("inf"), float("inf")]
    for position, name in enumerate(node.input[1:3]):
        if not name:
            continue
        if name not in graph.constants:
            return None
        limits[position] = float(graph.constants[name])
    return limits[0], limits[1]


def _pool_globally(graph: Graph) -> None:
    """A mean over all spatial axes between a dequantize and a quantize node becomes a global average pooling."""
    for node in graph.model.graph.node:
        users = graph.users[node.output[0]]
        x = graph.producer.get(node.input[0]) if node.input else None
        rank = len(graph.shapes.get(node.input[0], [])) if node.input else 0
        if (
            node.op_type != "ReduceMean"
            or x is None
            or x.op_type != "DequantizeLinear"
            or len(users) != 1
            or users[0].op_type != "QuantizeLinear"
            or rank < 3
            or len(node.input) < 2
            or sorted(int(axis) % rank for axis in graph.constants[node.input[1]]) != list(range(2, rank))
        ):
            graph.nodes.append(node)
            continue
        keep = next((attribute.i for attribute in node.attribute if attribute.name == "keepdims"), 1)
        if keep:
            graph.add("GlobalAveragePool", [node.input[0]], node.output[0], node.name)
            continue
        # The reshape goes behind the quantize node, which then follows the pooling directly.
        quantize = users[0]
        pooled = graph.add("GlobalAveragePool", [node.input[0]], f"{node.output[0]}.pooled", node.name)
        levels = graph.add("QuantizeLinear", [pooled, *quantize.input[1:3]], f"{node.output[0]}.levels", quantize.name)
        graph.add("Flatten", [levels], f"{quantize.output[0]}", f"{node.name}.flatten", axis=1)
        quantize.input[0] = ""  # marks it as replaced
    graph.nodes = [node for node in graph.nodes if not (node.op_type == "QuantizeLinear" and node.input[0] == "")]
    graph.commit()


def _multiply_integers(graph: Graph) -> None:
    """Give convolutions and linear operators the form that has an int8 kernel."""
    for node in graph.model.graph.node:
        operands = operands_of(graph, node) if node.op_type in ("Conv", "Gemm") else None
        if operands is None:
            graph.nodes.append(node)
            continue
        dense = attribute(node, "group", 1) == 1 and bool(operands.spatial)
        levels = levels_of(graph, node)
        if node.op_type == "Gemm":
            _as_product(graph, node, operands) if operands.transposed else graph.nodes.append(node)
        elif levels and (levels >= FULL_LEVELS or not dense):
            _round_bias(graph, node, operands, integer_bias(graph, node, operands))
        elif levels and (bias := integer_bias(graph, node, operands)).exact:
            _round_bias(graph, node, operands, bias)
        elif dense:
            _as_patches(graph, node, operands)
        else:
            graph.nodes.append(node)
    graph.commit()


def _round_bias(graph: Graph, node: NodeProto, operands: Operands, bias: IntegerBias) -> None:
    """A convolution between dequantize and quantize nodes, with the int32 bias that the kernel takes."""
    x = node.input[0]
    if bias.shift:
        bits = graph.constant(f"shift_{bias.shift}", np.full((), bias.shift, np.uint8))
        levels = graph.add("BitShift", [operands.x.input[0], bits], f"{node.name}.wide", f"{node.name}.wide", direction="LEFT")
        scale = np.full((), np.float32(operands.x_scale) / np.float32(2**bias.shift), np.float32)
        zero = np.left_shift(operands.x_zero, np.uint8(bias.shift))
        names = [graph.constant(f"{node.name}.x_scale", scale), graph.constant(f"{node.name}.x_zero", zero)]
        x = graph.add("DequantizeLinear", [levels, *names], f"{node.name}.x", f"{node.name}.x_dq")
    weight = _dequantized(graph, node, bias.weight, bias.weight_scale, axis=0, dtype=np.int8)
    scale_of_sums = sums_scale(operands.x_scale, bias.weight_scale, bias.shift).astype(np.float32)
    bias_name = _dequantized(graph, node, bias.integers, scale_of_sums, axis=0, dtype=np.int32)
    rewritten = NodeProto()
    rewritten.CopyFrom(node)
    del rewritten.input[:]
    rewritten.input.extend([x, weight, bias_name])
    graph.nodes.append(rewritten)


def _dequantized(graph: Graph, node: NodeProto, integers: Array, scale: Array, *, axis: int, dtype: Any) -> str:
    """A dequantize node over a constant."""
    what = "bias" if dtype is np.int32 else "weight"
    names = [
        graph.constant(f"{node.name}.{what}", integers),
        graph.constant(f"{node.name}.{what}_scale", scale),
        graph.constant(f"zeros_{what}_{len(scale)}", np.zeros(len(scale), dtype)),
    ]
    return graph.add("DequantizeLinear", names, f"{node.name}.{what}_real", f"{node.name}.{what}_dq", axis=axis)


def _as_product(graph: Graph, node: NodeProto, operands: Operands) -> None:
    """A linear operator without its bias, which is added behind it."""
    weight = _dequantized(graph, node, operands.weight, operands.weight_scale, axis=0, dtype=np.int8)
    product = graph.add("Gemm", [node.input[0], weight], f"{node.name}.product", node.name, transB=1)
    graph.add("Add", [product, graph.constant(f"{node.name}.bias", operands.bias)], node.output[0], f"{node.name}.bias_add")


def _as_patches(graph: Graph, node: NodeProto, operands: Operands) -> None:
    """A convolution as a matrix product over gathered patches of the 8-bit input, channels last."""
    rank = len(operands.spatial)
    kernel = operands.weight.shape[2:]
    strides = attribute(node, "strides", [1] * rank)
    dilations = attribute(node, "dilations", [1] * rank)
    pads = attribute(node, "pads", [0] * 2 * rank)
    last = [0, *range(2, rank + 2), 1]
    levels = graph.add("Transpose", [operands.x.input[0]], f"{node.name}.nhwc", f"{node.name}.nhwc", perm=last)
    if any(pads):
        widths = np.array([0, *pads[:rank], 0, 0, *pads[rank:], 0], np.int64)
        names = [levels, graph.constant(f"{node.name}.pads", widths), graph.constant("pad_level", operands.x_zero)]
        levels = graph.add("Pad", names, f"{node.name}.padded", f"{node.name}.pad")
    if any(size > 1 for size in kernel) or any(stride > 1 for stride in strides):
        axes = graph.constant(f"axes_{rank}", np.arange(1, rank + 1))
        steps = graph.constant(f"{node.name}.strides", np.array(strides, np.int64))
        parts = []
        for number, offset in enumerate(np.ndindex(*kernel)):
            start = np.array([o * d for o, d in zip(offset, dilations, strict=True)], np.int64)
            reach = np.array([(size - 1) * stride + 1 for size, stride in zip(operands.spatial, strides, strict=True)])
            limits = [
                graph.constant(f"{node.name}.from{number}", start),
                graph.constant(f"{node.name}.to{number}", start + reach),
            ]
            name = f"{node.name}.patch{number}"
            parts.append(graph.add("Slice", [levels, *limits, axes, steps], name, name))
        levels = parts[0]
        if len(parts) > 1:
            levels = graph.add("Concat", parts, f"{node.name}.patches", f"{node.name}.patches", axis=rank + 1)
    patches = graph.add("DequantizeLinear", [levels, *operands.x.input[1:3]], f"{node.name}.x", f"{node.name}.x_dq")
    order = [*range(2, rank + 2), 1, 0]  # (out, in, K, K) -> (K, K, in, out)
    matrix = np.ascontiguousarray(operands.weight.transpose(order).reshape(-1, len(operands.weight)))
    weight = _dequantized(graph, node, matrix, operands.weight_scale, axis=1, dtype=np.int8)
    sums = _product(graph, node, operands, patches, weight, f"{node.name}.sums")
    graph.add("Transpose", [sums], node.output[0], f"{node.name}.nchw", perm=[0, rank + 1, *range(1, rank + 1)])


def _product(graph: Graph, node: NodeProto, operands: Operands, x: str, weight: str, output: str) -> str:
    product = graph.add("MatMul", [x, weight], f"{node.name}.product", node.name)
    bias = graph.constant(f"{node.name}.bias", operands.bias)
    return graph.add("Add", [product, bias], output, f"{node.name}.bias_add")
