"""What Inductor made of each operator, read from the graph that it lowers to kernels, behind all of its fusions."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor import config as inductor_config

from inc_clusterq.deployment.inductor import Compiled, compile_frozen
from inc_clusterq.deployment.operators import WEIGHTED, Kind, Operator, SourceOperator, describe, of_kind, source_operators

aten = torch.ops.aten
# Handlers of torch's pattern matcher, each of which stands for one fused int8 kernel; by their own names.
FUSED: dict[str, tuple[tuple[Kind, ...], str]] = {
    "qconv": (("convolution",), "onednn.qconv_pointwise"),
    "qconv_binary": (("convolution", "addition"), "onednn.qconv2d_pointwise.binary"),
    "qlinear": (("linear",), "onednn.qlinear_pointwise"),
    "qlinear_binary": (("linear", "addition"), "onednn.qlinear_pointwise.binary"),
    "qmaxpool2d": (("pooling",), "quantized.max_pool2d"),
    "qcat": (("concatenation",), "concatenation of 8-bit tensors"),
}
PLAIN: dict[str, Kind] = {
    "aten::convolution": "convolution",
    "mkldnn::_convolution_pointwise": "convolution",
    "mkldnn::_convolution_transpose_pointwise": "convolution",
    "onednn::qconv_pointwise": "convolution",
    "onednn::qconv2d_pointwise": "convolution",
    "aten::addmm": "linear",
    "aten::mm": "linear",
    "aten::linear": "linear",
    "mkldnn::_linear_pointwise": "linear",
    "mkl::_mkl_linear": "linear",
    "onednn::qlinear_pointwise": "linear",
    "aten::add": "addition",
    "aten::mean": "pooling",
    "aten::avg_pool2d": "pooling",
    "aten::_adaptive_avg_pool2d": "pooling",
    "aten::max_pool2d_with_indices": "pooling",
    "prims::_low_memory_max_pool_with_offsets": "pooling",
    "aten::cat": "concatenation",
}
INT8 = ("onednn.", "quantized.", "concatenation of 8-bit")  # what names of int8 kernels begin with
TINY = 16
TINY_REASON = "Inductor makes a loop of products of one row with one output, or with a bias and at most 16 inputs and outputs"
GENERATED: tuple[Kind, ...] = ("addition", "pooling", "concatenation")  # loops that Inductor writes itself


def compile_and_list(
    module: fx.GraphModule,
    example: Tensor,  # shape: (1, *shape)
) -> tuple[Compiled, list[Operator]]:
    """The compiled model, and what became of each operator of the saved program."""
    graphs: list[list[tuple[Kind, str]]] = []

    def watch(graph: fx.Graph) -> None:
        graphs.append([kernel for node in graph.nodes for kernel in _kernels(node)])

    with inductor_config.patch(post_grad_custom_post_pass=watch):  # a frozen graph never comes from the cache
        compiled = compile_frozen(module, example)
    tiny = _tiny_products(module) if len(example) == 1 else set()
    return compiled, _matched(source_operators(module), [kernel for graph in graphs for kernel in graph], tiny)


def _kernels(node: fx.Node) -> Iterator[tuple[Kind, str]]:
    """Kind and kernel of each operator that a node of the lowered graph stands for."""
    target: Any = node.target
    if isinstance(target, functools.partial):  # what the pattern matcher has put in the place of the nodes that it matched
        name = getattr(target.func, "__name__", "")
        if name in FUSED:
            kinds, kernel = FUSED[name]
            yield from ((kind, kernel) for kind in kinds)
            return
        for matched in getattr(target.args[0], "nodes", ()) if target.args else ():
            yield from _plain(matched)
    elif node.op == "call_function":
        yield from _plain(node)


def _plain(node: fx.Node) -> Iterator[tuple[Kind, str]]:
    if isinstance(node.target, torch._ops.OpOverload):
        name = node.target._schema.name
        kind = PLAIN.get(name)
        if kind is not None and not (kind == "addition" and not _adds_feature_maps(node)):
            yield kind, name.replace("::", ".")


def _adds_feature_maps(node: fx.Node) -> bool:
    values = [argument.meta.get("val") for argument in node.all_input_nodes]
    return len(values) == 2 and all(not isinstance(value, Tensor) or value.dim() >= 2 for value in values)


def _tiny_products(module: fx.GraphModule) -> set[str]:
    """Linear operators that Inductor takes apart where it knows that they have one row, of batches of one."""
    found = set()
    for node in module.graph.nodes:
        if node.target is aten.linear.default:
            outputs, inputs = node.args[1].meta["val"].shape
            rows = node.args[0].meta["val"].shape[1:-1].numel()  # of an image
            has_bias = len(node.args) > 2 and node.args[2] is not None
            if rows == 1 and (outputs == 1 or (has_bias and max(inputs, outputs) <= TINY)):
                found.add(node.name)
    return found


def _matched(sources: list[SourceOperator], kernels: list[tuple[Kind, str]], tiny: set[str]) -> list[Operator]:
    apart = [describe(source, "float", "generated loop", TINY_REASON) for source in sources if source.node in tiny]
    kept = [source for source in sources if source.node not in tiny]
    matched = {source.node: found for source, found in zip(kept, _in_order(kept, kernels), strict=True)}
    loops = iter(apart)
    return [matched[source.node] if source.node in matched else next(loops) for source in sources]


def _in_order(sources: list[SourceOperator], kernels: list[tuple[Kind, str]]) -> list[Operator]:
    """The n-th kernel of each kind belongs to the n-th operator of that kind, among those in float and among the others.

    A convolution that an addition is fused into stands where the addition stood, behind the other branch.
    """
    names = {kind: [name for found, name in kernels if found == kind] for kind in {source.kind for source in sources}}
    in_float = {kind: iter(_taken_for_float(names[kind], kind, sources)) for kind in names}
    by_kind = {kind: iter(names[kind]) for kind in names}
    counts = {kind: (sum(found == kind for found, _ in kernels), len(list(of_kind(sources, kind)))) for kind in by_kind}
    result: list[Operator] = []
    for source in sources:
        kernel = next((by_kind if source.quantized or source.kind not in WEIGHTED else in_float)[source.kind], None)
        found, expected = counts[source.kind]
        if kernel is None or found != expected:
            reason = f"Inductor compiled {found} {source.kind} kernels for {expected} of the program: which is which is unknown"
            result.append(describe(source, "float", kernel or "not found", reason))
        elif kernel.startswith(INT8):
            result.append(describe(source, "int8" if source.kind not in ("addition",) else "fused", kernel))
        elif source.kind in GENERATED:
            result.append(describe(source, "fused", f"generated loop ({kernel})"))
        else:
            reason = "no int8 pattern of Inductor matched it"
            result.append(describe(source, "float", kernel, reason))
    return result


def _taken_for_float(names: list[str], kind: Kind, sources: list[SourceOperator]) -> list[str]:
    """Take out of the kernels of a kind, and return, those of the operators that the program itself has in float."""
    wanted = sum(not source.quantized for source in of_kind(sources, kind)) if kind in WEIGHTED else 0
    taken = [name for name in names if not name.startswith(INT8)][:wanted]
    for name in taken:
        names.remove(name)
    return taken
