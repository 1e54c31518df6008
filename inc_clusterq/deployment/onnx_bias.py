"""What an int8 convolution multiplies, and the integer bias with which its sums fall on the right levels.

The kernel adds an int32 bias in steps of s_x s_w to its sums, where the evaluated model has a real one. With outputs of 8
bits the nearest integer moves a value by less than their own rounding. Below 8 bits a value that crosses a border between
two levels moves by a whole coarse step; but there the sums have gaps, since weights and inputs use few of their 256
levels. Both are multiplied by the power of two that fits, with scales smaller by as much, and the bias is put where no sum
changes its level. The few channels without such an integer get one by a weight scale that is larger or smaller by at most
1 %: within that, what counts is on which level each sum falls, and that stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from onnx import NodeProto

from inc_clusterq.deployment.backend import STORED_MAX
from inc_clusterq.deployment.onnx_graph import Array, Graph, attribute

FULL_LEVELS = 129  # fewer are below 8 bits; a ReLU6 may cut a few off the 256
STRETCHES = (1.0, *(1 + sign * step / 5000 for step in range(1, 51) for sign in (1, -1)))  # of a weight scale
PICKING = ("MaxPool", "Transpose", "Reshape", "Flatten")  # their outputs are among their inputs
LARGEST_BIAS = 2**30  # leaves as much for the sums
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
    weight: Array  # int8, (out, in, ...)
    weight_scale: Array  # float32, (out,)
    exact: bool  # every sum falls on the level that it has with the real bias


def integer_bias(graph: Graph, node: NodeProto, operands: Operands) -> IntegerBias:
    """The nearest integers, or with outputs below 8 bits those that leave every sum on its level."""
    coarse = levels_of(graph, node) < FULL_LEVELS
    shift = _spare_bits(graph, operands.x) if coarse else 0
    operands = _with_fitting_bias(operands, shift)
    scale = sums_scale(operands.x_scale, operands.weight_scale, shift)
    nearest = _whole(operands.bias / scale)
    if not coarse:
        return IntegerBias(nearest, shift, operands.weight, operands.weight_scale, exact=False)
    unit = operands.widened << shift
    borders, sums = borders_of(graph, node), _reachable(graph, operands)
    first = np.ceil((borders / scale[:, None] - (operands.bias / scale)[:, None]) / unit)  # the lowest sum above a border
    integers, weight_scale = nearest.copy(), operands.weight_scale.copy()
    undecided = np.ones(len(integers), bool)
    for stretch in STRETCHES:
        stretched = (operands.weight_scale * np.float32(stretch)).astype(np.float32)
        scale = sums_scale(operands.x_scale, stretched, shift)
        low, high = between_borders(borders / scale[:, None], first, sums, unit, operands.bias / scale)
        middle = _whole((low + high) / 2)
        decided = undecided & (low < middle) & (middle < high)
        integers[decided], weight_scale[decided] = middle[decided], stretched[decided]
        undecided &= ~decided
        if not undecided.any() or unit == 1:
            break
    return IntegerBias(integers, shift, operands.weight, weight_scale, exact=not undecided.any())


def _with_fitting_bias(operands: Operands, shift: int) -> Operands:
    """With coarser weights where 32 bits do not hold the bias in units of the sums, as in channels that were pruned.

    There the bias is a billion of these units. Rounding K weights to some of them moves a sum by less than K 3e-7 of the bias.
    """
    unit = sums_scale(operands.x_scale, operands.weight_scale, shift)
    coarser = np.maximum(np.ceil(np.abs(operands.bias) / unit / LARGEST_BIAS), 1)
    if (coarser == 1).all():
        return operands
    integers = operands.weight.astype(np.int16) // operands.widened
    rounded = np.rint(integers / coarser.reshape(-1, *[1] * (integers.ndim - 1))) * operands.widened
    return replace(operands, weight=rounded.astype(np.int8), weight_scale=(operands.weight_scale * coarser).astype(np.float32))


def _whole(values: Array) -> Array:
    return np.rint(values).astype(np.int32)


def sums_scale(x_scale: float, weight_scale: Array, shift: int) -> Array:
    """What one unit of each channel's sum is worth when the input's integers are multiplied by 2^shift, (out,), float64."""
    return (np.float32(x_scale) / np.float32(2**shift) * weight_scale).astype(np.float32).astype(np.float64)


def _reachable(graph: Graph, operands: Operands) -> tuple[Array, Array]:
    """Lowest and highest sum of each channel, in multiples of the unit, shape (out, 1) each."""
    low, high = _limits(graph, operands.x.input[0])
    zero = int(operands.x_zero.item())
    weight = operands.weight.reshape(len(operands.weight), -1).astype(np.int64) // operands.widened
    products = np.stack([weight * (low - zero), weight * (high - zero)])
    return products.min(0).sum(1, keepdims=True), products.max(0).sum(1, keepdims=True)


def borders_of(graph: Graph, node: NodeProto) -> Array:
    """Real values at which a convolution's output changes from one level to the next, shape (1, levels - 1)."""
    borders = []
    for quantize in graph.users[node.output[0]]:
        scale, zero = (graph.constants[name].astype(np.float64) for name in quantize.input[1:3])
        clips = [clip for clip in graph.users[quantize.output[0]] if clip.op_type == "Clip"]
        low, high = (int(graph.constants[name].item()) for name in clips[0].input[1:3]) if clips else (0, STORED_MAX)
        borders.append((np.arange(low, high) + 0.5 - zero) * scale)
    return np.concatenate(borders)[None]


def between_borders(
    borders: Array,  # (C, L): between the levels, in units of the sums
    first: Array,  # (C, L): the lowest sum above each border, in multiples of `unit`
    sums: tuple[Array, Array],  # (C, 1) each: lowest and highest sum that occurs, in multiples of `unit`
    unit: int,
    bias: Array,  # (C,): the real one; the interval reaches at most a unit away from it
) -> tuple[Array, Array]:
    """The interval of biases with which every sum that occurs stays on its level, (C,) each.

    With the border t between two levels and the lowest sum a above it, a + bias >= t > a - unit + bias.
    """
    lowest, highest = sums
    above, below = np.maximum(first, lowest), np.minimum(first - 1, highest)
    least = np.where(first <= highest, borders - above * unit, -np.inf).max(1)
    most = np.where(first - 1 >= lowest, borders - below * unit, np.inf).min(1)
    return np.maximum(least, bias - unit), np.minimum(most, bias + unit)


def _spare_bits(graph: Graph, dequantize: NodeProto) -> int:
    """High bits that the integers in front of a dequantize node leave empty."""
    return 8 - max(_limits(graph, dequantize.input[0])[1], 1).bit_length()


def _limits(graph: Graph, name: str) -> tuple[int, int]:
    """Least and most of 8-bit integers: those of the clip that they come from, through what pads, moves or picks them."""
    node = graph.producer.get(name)
    if node is not None and node.op_type == "Clip":
        low, high = (int(graph.constants[limit].item()) for limit in node.input[1:3])
        return low, high
    if node is not None and node.op_type in PICKING:
        return _limits(graph, node.input[0])
    if node is None or node.op_type != "Pad" or attribute(node, "mode", b"constant") != b"constant":
        return 0, STORED_MAX
    beside = graph.constants.get(node.input[2], np.array(STORED_MAX)) if len(node.input) > 2 else np.array(0)
    low, high = _limits(graph, node.input[0])
    return min(low, int(beside)), max(high, int(beside))


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
