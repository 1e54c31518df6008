"""A saved program, computed as the int8 kernels compute it: what is scored, and what deployed models are compared with.

Run as it stands, a program multiplies dequantized float32 values. Their sums depend on the order of the terms, so that a
value near the border between two levels falls to either side, and every later layer carries that on: on a network for small
devices the class of one image in fifty changes with the size of the batch alone. An int8 kernel has exact sums; what it
rounds is its epilogue, one float32 operation after another. Here sums are exact too, and the epilogue is that of oneDNN:

    v = (sum * x_scale) * w_scale + bias              each operation rounded; x counts from its zero point
    v = sum * (x_scale * w_scale) + bias              on processors without AVX-512 and AVX-VNNI
    v = fma(q - zero_point, scale, v)                 a residual of 8 bits that the kernel adds, rounded once
    v = v * clamp(v * float32(1 / 6) + 0.5, 0, 1)     hardswish; ReLU and clamps round nothing
    q = round(v * (1 / scale) + zero_point)           the inverse and the sum rounded, ties to even, then saturated

A quantize node that no kernel takes in, for example because two nodes read what it quantizes, is a loop that Inductor
writes: round(v * float32(1 / scale)) + zero_point, which is also what the node does when it runs by itself. The mean of a
feature map is summed in float32 position by position, and the many means that lie exactly between two levels follow that.

Not followed are the kernels' approximations of the exponential (SiLU, sigmoid), and layers that stay in float.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, fx, nn

from inc_clusterq.cpu import Cpu, cpu, multiplies_blocks
from inc_clusterq.deployment.backend import DEQUANTIZE, DEQUANTIZE_WEIGHT, QUANTIZE
from inc_clusterq.deployment.operators import KINDS, MOVES
from inc_clusterq.deployment.shapes import record_shapes

aten = torch.ops.aten

EXACT_FLOAT32 = 2**24  # integers up to here are exact in float32, and so are sums that stay below it
PRODUCTS = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.linear.default}
RELUS = {aten.relu.default, aten.relu_.default}
HARDSWISHES = {aten.hardswish.default, aten.hardswish_.default}
EPILOGUES = {
    *RELUS,
    *HARDSWISHES,
    *(aten.hardtanh.default, aten.hardtanh_.default),
    *(aten.silu.default, aten.silu_.default),
}
MEANS = {aten.adaptive_avg_pool2d.default, aten.mean.dim}

Rule = Callable[[fx.Node, list[Any], dict[str, Any]], Tensor]  # node, values of its arguments and keyword arguments


class KernelArithmetic(nn.Module):
    """A saved program, run node by node with exact sums and the roundings of a processor's kernels."""

    def __init__(self, module: fx.GraphModule, processor: Cpu) -> None:
        super().__init__()
        record_shapes(module)
        self.module = module
        self._rules = _rules(module, processor)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _Interpreter(self.module, self._rules).run(x)
        return result


def kernel_arithmetic(module: nn.Module, processor: Cpu | None = None) -> nn.Module:
    """`module` as int8 kernels compute it, where it is a program that quantizes; any other module as it is.

    The kernels are those of `processor`, by default this machine's.
    """
    if isinstance(module, fx.GraphModule) and any(node.target is QUANTIZE for node in module.graph.nodes):
        return KernelArithmetic(module, processor or cpu())
    return module


class _Interpreter(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, rules: dict[fx.Node, Rule]) -> None:
        super().__init__(module)
        self.rules = rules

    def run_node(self, n: fx.Node) -> Any:
        rule = self.rules.get(n)
        if rule is None:
            return super().run_node(n)
        values, options = self.fetch_args_kwargs_from_env(n)
        return rule(n, list(values), options)


def _rules(module: fx.GraphModule, processor: Cpu) -> dict[fx.Node, Rule]:
    """How those nodes are computed that a kernel computes otherwise than eager mode."""
    rules: dict[fx.Node, Rule] = {}
    for node in module.graph.nodes:
        if node.target in PRODUCTS:
            x, weight = _source(node.args[0]), _source(node.args[1])
            if x.target is DEQUANTIZE and weight.target is DEQUANTIZE_WEIGHT:
                rules[node] = _Product(module, x, weight, scales_first=not multiplies_blocks(processor))
        elif node.target in MEANS and _is_global(node):
            rules[node] = _mean
        elif node.target in HARDSWISHES and isinstance(rules.get(node.args[0]), _Product) and len(node.args[0].users) == 1:
            rules[node] = _hardswish
    for node in [node for node in module.graph.nodes if node.target is QUANTIZE]:
        product = _behind(node.args[0], EPILOGUES)
        addition = _behind(node.args[0], RELUS)
        if isinstance(rules.get(product), _Product) and len(product.users) == 1:
            rules[node] = _quantize
        elif KINDS.get(addition.target) == "addition" and len(addition.users) == 1:
            fused = [place for place in (0, 1) if _adds_residual(addition, place, rules)]
            if fused:
                rules[addition], rules[node] = _Residual(addition, fused[0]), _quantize
    return rules


class _Product:
    """A convolution or linear operator of integers, with the epilogue's first part."""

    def __init__(self, module: fx.GraphModule, x: fx.Node, weight: fx.Node, *, scales_first: bool) -> None:
        integers, scales = (_constant(module, argument) for argument in weight.args[:2])
        _, x_scale, zero_point, lowest, highest, _ = x.args
        farthest = max(abs(lowest - zero_point), abs(highest - zero_point))  # type: ignore[operator]
        most = farthest * int(integers.flatten(1).long().abs().sum(1).max())
        self.dtype = torch.float32 if most < EXACT_FLOAT32 else torch.float64
        self.weight, self.x_scale, self.shape = integers.to(self.dtype), _single(x_scale), (-1, *[1] * (integers.dim() - 2))
        w_scales = scales.float().view(self.shape)
        self.factors = [self.x_scale * w_scales] if scales_first else [self.x_scale, w_scales]

    def __call__(self, node: fx.Node, values: list[Any], options: dict[str, Any]) -> Tensor:
        x, _, *more = values
        integers = torch.round(x / self.x_scale).to(self.dtype)
        exact = node.target(integers, self.weight, None, *more[1:], **options)  # type: ignore[operator]
        result: Tensor = exact.float()
        for factor in self.factors:
            result = result * factor
        return result if not more or more[0] is None else torch.add(result, more[0].view(self.shape))


class _Residual:
    """An addition that a convolution takes into its epilogue."""

    def __init__(self, addition: fx.Node, place: int) -> None:
        self.place = place  # of the convolution among the two arguments
        self.scale = _single(_argument(addition, 1 - place).args[1])

    def __call__(self, node: fx.Node, values: list[Any], options: dict[str, Any]) -> Tensor:
        product, residual = values[self.place], values[1 - self.place]
        integers = torch.round(residual / self.scale)
        # A product of a float32 number and an integer below 512 is exact in float64: one rounding, as in a fused multiply-add.
        total: Tensor = integers.double() * self.scale.double() + product.double()
        return total.float()


def _quantize(node: fx.Node, values: list[Any], options: dict[str, Any]) -> Tensor:
    """As the kernel does behind its sums: the zero point is added before the rounding."""
    x, scale, zero_point, lowest, highest, dtype = values
    result: Tensor = torch.round(x * (1 / _single(scale)) + zero_point).clamp(lowest, highest).to(dtype)
    return result


def _hardswish(node: fx.Node, values: list[Any], options: dict[str, Any]) -> Tensor:
    """As the kernel does: the sixth is a factor."""
    x: Tensor = values[0]
    result: Tensor = x * (x * _single(1 / 6) + 0.5).clamp(0, 1)
    return result


def _mean(node: fx.Node, values: list[Any], options: dict[str, Any]) -> Tensor:
    """Over height and width, position by position."""
    x = values[0]
    positions = x.flatten(2).unbind(2)
    total = positions[0]
    for position in positions[1:]:
        total = total + position
    result: Tensor = total / len(positions)
    keeps = node.target is not aten.mean.dim or (len(values) > 2 and values[2])
    return result[..., None, None] if keeps else result


def _is_global(node: fx.Node) -> bool:
    """Whether it takes the mean of whole feature maps (N, C, H, W)."""
    value = node.all_input_nodes[0].meta.get("val")
    if not isinstance(value, Tensor) or value.dim() != 4 or not isinstance(node.args[1], (list, tuple)):
        return False
    sizes: list[Any] = list(node.args[1])
    if node.target is aten.mean.dim:
        return sorted(axis % 4 for axis in sizes) == [2, 3] and not node.kwargs
    return sizes == [1, 1]


def _adds_residual(addition: fx.Node, place: int, rules: dict[fx.Node, Rule]) -> bool:
    """Whether Inductor has the convolution at `place` add the other argument, by the conditions of its int8 patterns.

    The convolution overwrites what it adds, which nothing may read afterwards.
    """
    if len(addition.all_input_nodes) != 2 or addition.kwargs.get("alpha", 1) != 1:
        return False
    convolution, residual = _argument(addition, place), _argument(addition, 1 - place)
    if not isinstance(rules.get(convolution), _Product) or convolution.target is not aten.conv2d.default:
        return False
    if residual.target is not DEQUANTIZE or len(convolution.users) != 1 or not _same_size(convolution, residual):
        return False
    kept = _argument(residual, 0)
    readers = {reader for dequantize in kept.users for reader in dequantize.users}
    before = {addition, convolution, *_ancestors(convolution)}
    return kept is not _argument(_source(convolution.args[0]), 0) and readers <= before


def _single(value: Any) -> Tensor:
    """A number as the kernels take it."""
    return torch.tensor(value, dtype=torch.float32)


def _same_size(first: fx.Node, second: fx.Node) -> bool:
    shapes = [tuple(node.meta["val"].shape[1:]) for node in (first, second) if isinstance(node.meta.get("val"), Tensor)]
    return len(shapes) == 2 and shapes[0] == shapes[1]


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    ahead = [node]
    while ahead:
        new = [argument for argument in ahead.pop().all_input_nodes if argument not in found]
        found.update(new)
        ahead += new
    return found


def _behind(node: Any, targets: Collection[Any]) -> fx.Node:
    """`node`, or its input where it is one of `targets` and has a single reader."""
    assert isinstance(node, fx.Node)
    inner = node.args[0] if node.target in targets and len(node.users) == 1 else node
    assert isinstance(inner, fx.Node)
    return inner


def _source(node: Any) -> fx.Node:
    """What a node reads, behind nodes that only move values."""
    while node.target in MOVES:
        node = node.all_input_nodes[0]
    assert isinstance(node, fx.Node)
    return node


def _argument(node: fx.Node, place: int) -> fx.Node:
    argument = node.args[place]
    assert isinstance(argument, fx.Node)
    return argument


def _constant(module: fx.GraphModule, value: Any) -> Any:
    """The value of an argument that does not depend on the input."""
    if not isinstance(value, fx.Node):
        return value
    if value.op == "get_attr":
        owner, _, leaf = str(value.target).rpartition(".")
        return getattr(module.get_submodule(owner), leaf)
    return value.target(*(_constant(module, argument) for argument in value.args))  # type: ignore[operator]
