"""What an int8 convolution multiplies, and the integer bias with which its sums fall on the right levels.

The kernel adds an int32 bias in steps of s_x s_w to its sums, where the evaluated model has a real one. With outputs of 8
bits the nearest integer moves a value by less than their own rounding. Below 8 bits a value that crosses a border between
two levels moves by a whole coarse step; but there the sums have gaps, since weights and inputs use few of their 256
levels. Both are multiplied by the power of two that fits, with scales smaller by as much, and the bias is put where no sum
changes its level, if there is such an integer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import NodeProto

from inc_clusterq.deployment.onnx_graph import STORED_MAX, Array, Graph, attribute

FULL_LEVELS = 129  # fewer are below 8 bits; a ReLU6 may cut a few off the 256
SMALL_WEIGHT = 63  # products of 8-bit activations with weights up to here never saturate 16 bits, with or without VNNI


@dataclass(frozen=True)
class Operands:
    """What a convolution or linear operator reads."""

    x: NodeProto  # its dequantize node
    x_scale: float
    x_zero: Array
    weight_name: str
    weight: Array  # int8, (out, in, ...)
    weight_scale: Array  # (out,)
    bias: Array  # (out,)
    widened: int  # the integers are multiples of this
    spatial: tuple[int, ...]  # of the output; empty where unknown
    transposed: bool


def operands_of(graph: Graph, node: NodeProto) -> Operands | None:
    """What a convolution or linear operator with quantized input and weight reads; None for any other."""
    x, dequantize = graph.producer.get(node.input[0]), graph.producer.get(node.input[1])
    if x is None or dequantize is None or x.op_type != "DequantizeLinear" or dequantize.op_type != "DequantizeLinear":
        return None
    weight = graph.constants.get(dequantize.input[0])
    if weight is None or weight.dtype != np.int8:
        return None
    scale = np.broadcast_to(graph.constants[dequantize.input[1]], weight.shape[:1])
    bias = graph.constants[node.input[2]] if len(node.input) > 2 else np.zeros(len(weight), np.float32)
    widened = _widening(weight)
    shape = graph.shapes.get(node.output[0], [])[2:]
    return Operands(
        x=x,
        x_scale=float(graph.constants[x.input[1]]),
        x_zero=graph.constants[x.input[2]],
        weight_name=dequantize.input[0],
        weight=(weight.astype(np.int16) * widened).astype(np.int8),
        weight_scale=(scale / np.float32(widened)).astype(np.float32),
        bias=bias,
        widened=widened,
        spatial=tuple(size for size in shape if size) if all(shape) else (),
        transposed=bool(attribute(node, "transB", 0)),
    )


def _widening(weight: Array) -> int:
    """Largest power of two by which the integers can be multiplied without meeting a saturation."""
    largest, factor = int(np.abs(weight.astype(np.int16)).max(initial=1)), 1
    while largest * factor * 2 <= SMALL_WEIGHT + 1:
        factor *= 2
    return factor


@dataclass(frozen=True)
class IntegerBias:
    """The bias that an int8 convolution adds to its sums."""

    integers: Array  # int32, (out,)
    shift: int  # the input's integers are multiplied by 2^shift
    exact: bool  # every sum falls on the level that it has with the real bias


def integer_bias(graph: Graph, node: NodeProto, operands: Operands) -> IntegerBias:
    """The nearest integers, or with outputs below 8 bits those that leave every sum on its level."""
    coarse = levels_of(graph, node) < FULL_LEVELS
    shift = _spare_bits(graph, operands.x) if coarse else 0
    scale = scale_of_sums(operands, shift).astype(np.float64)
    bias = operands.bias.astype(np.float64) / scale
    low = high = bias
    if coarse:
        low, high = between_borders(bias, borders_of(graph, node) / scale[:, None], operands.widened << shift)
        bias = (low + high) / 2
    limit = np.iinfo(np.int32).max
    integers = np.clip(np.rint(bias), -limit, limit).astype(np.int32)
    return IntegerBias(integers, shift, exact=bool(((low < integers) & (integers < high)).all()))


def scale_of_sums(operands: Operands, shift: int) -> Array:
    """What one unit of each channel's sum is worth when the input's integers are multiplied by 2^shift, shape (out,)."""
    x_scale = np.float32(operands.x_scale) / np.float32(2**shift)
    return (x_scale * operands.weight_scale).astype(np.float32)


def borders_of(graph: Graph, node: NodeProto) -> Array:
    """Real values at which a convolution's output changes from one level to the next, shape (1, levels - 1)."""
    borders = []
    for quantize in graph.users[node.output[0]]:
        scale, zero = (graph.constants[name].astype(np.float64) for name in quantize.input[1:3])
        clips = [clip for clip in graph.users[quantize.output[0]] if clip.op_type == "Clip"]
        low, high = (int(graph.constants[name].item()) for name in clips[0].input[1:3]) if clips else (0, STORED_MAX)
        borders.append((np.arange(low, high) + 0.5 - zero) * scale)
    return np.concatenate(borders)[None]


def between_borders(bias: Array, borders: Array, unit: int) -> tuple[Array, Array]:
    """The interval around `bias` (C,) in which every sum stays on its level, given all `borders` (C, L) between levels.

    Sums are multiples a of `unit`. With the border t between two levels, the lowest sum above it is
        a_t = ceil((t - bias) / unit) unit ,
    and any bias in [t - a_t, t - a_t + unit) keeps it there and the next lower one below.
    """
    below = borders - np.ceil((borders - bias[:, None]) / unit) * unit
    return below.max(1), (below + unit).min(1)


def _spare_bits(graph: Graph, dequantize: NodeProto) -> int:
    """High bits that the integers in front of a dequantize node leave empty."""
    clip = graph.producer.get(dequantize.input[0])
    if clip is None or clip.op_type != "Clip":
        return 0
    return 8 - max(int(graph.constants[clip.input[2]]), 1).bit_length()


def levels_of(graph: Graph, node: NodeProto) -> int:
    """Number of values that a convolution's output is rounded to; 0 where something reads it unrounded."""
    fewest = STORED_MAX + 1
    users = graph.users[node.output[0]]
    for user in users:
        if user.op_type != "QuantizeLinear":
            return 0
        for clip in graph.users[user.output[0]]:
            if clip.op_type == "Clip":
                low, high = (int(graph.constants[name].item()) for name in clip.input[1:3])
                fewest = min(fewest, high - low + 1)
    return fewest if users else 0
