"""What became of every operator that the evaluated model quantizes: nothing is left in float silently.

*Quantizable* are all convolutions and linear operators, and the additions, pools and concatenations that read and write
nothing but quantized tensors. A residual addition that reads a convolution's unrounded sum is not: the evaluated model
rounds after it, and so does the deployed one.

Back ends keep the order of what they compile, so the n-th convolution of the saved program is the n-th of the compiled
one, and so on for each kind; that is how a kernel is told apart from another without trusting generated names.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from inc_clusterq.deployment.backend import DEQUANTIZE, DEQUANTIZE_WEIGHT, QUANTIZE
from inc_clusterq.errors import DeploymentError

aten = torch.ops.aten

Kind = Literal["convolution", "linear", "addition", "pooling", "concatenation"]
Precision = Literal["int8", "fused", "float"]
KINDS: dict[Any, Kind] = {
    aten.conv1d.default: "convolution",
    aten.conv2d.default: "convolution",
    aten.conv3d.default: "convolution",
    aten.conv_transpose1d.default: "convolution",
    aten.conv_transpose2d.input: "convolution",
    aten.conv_transpose3d.input: "convolution",
    aten.linear.default: "linear",
    aten.add.Tensor: "addition",
    aten.add_.Tensor: "addition",
    operator.add: "addition",
    aten.max_pool2d.default: "pooling",
    aten.avg_pool2d.default: "pooling",
    aten.adaptive_avg_pool2d.default: "pooling",
    aten.mean.dim: "pooling",
    aten.cat.default: "concatenation",
}
WEIGHTED: tuple[Kind, ...] = ("convolution", "linear")
# Nodes that only move values: what they hand on is as quantized as what they read.
MOVES = {aten.flatten.using_ints, aten.view.default, aten.reshape.default, aten.dropout.default, aten.permute.default}


@dataclass(frozen=True)
class SourceOperator:
    """An operator of the saved program."""

    name: str  # module that the user wrote, with the operator where that is no module of its own
    kind: Kind
    node: str
    quantizable: bool
    quantized: bool  # in the evaluated model


@dataclass(frozen=True)
class Operator:
    """An operator of the saved program, and what a back end made of it."""

    name: str
    kind: Kind
    quantizable: bool
    precision: Precision  # "fused": a loop over 8-bit tensors, or the epilogue of an int8 kernel
    kernel: str
    reason: str = ""  # why it is in float

    @property
    def fell_back(self) -> bool:
        """It could run in int8 and does not."""
        return self.quantizable and self.precision == "float"


def source_operators(graph_module: fx.GraphModule) -> list[SourceOperator]:
    """Convolutions, linear operators, additions, pools and concatenations of a saved program, in its order."""
    found: list[SourceOperator] = []
    taken: Counter[str] = Counter()
    for node in graph_module.graph.nodes:
        kind = KINDS.get(node.target) if node.op == "call_function" else None
        if kind is None or not _is_of_interest(node, kind):
            continue
        name = _name(node, kind)
        taken[name] += 1
        if taken[name] > 1:
            name = f"{name} ({taken[name]})"
        quantized = _quantized(node, kind)
        found.append(SourceOperator(name, kind, node.name, quantized or kind in WEIGHTED, quantized))
    return found


def describe(source: SourceOperator, precision: Precision, kernel: str, reason: str = "") -> Operator:
    """`source` with what became of it."""
    if precision == "float" and source.kind in WEIGHTED and not source.quantized:
        reason = "the host's quantizer leaves this operator in float"
    return Operator(source.name, source.kind, source.quantizable, precision, kernel, reason)


def node_name(source: SourceOperator) -> str:
    """Name of its node in files of other run times, which put words of their own behind a slash, and commas between names."""
    return f"{source.kind}:{source.name}".replace("/", "%2F").replace(",", "%2C")


def of_kind(sources: Sequence[SourceOperator], kind: Kind) -> Iterator[SourceOperator]:
    """Those of one kind, in order."""
    return (source for source in sources if source.kind == kind)


def fallbacks(operators: Sequence[Operator]) -> list[Operator]:
    """Those that could run in int8 and do not."""
    return [found for found in operators if found.fell_back]


def summary(operators: Sequence[Operator]) -> str:
    """One sentence: how many of each kind run in int8, and which fell back."""
    parts = []
    for kind in dict.fromkeys(found.kind for found in operators if found.quantizable):
        of_it = [found for found in operators if found.kind == kind and found.quantizable]
        in_int8 = sum(found.precision != "float" for found in of_it)
        parts.append(f"{in_int8} of {len(of_it)} {kind}{'' if kind == 'linear' else 's'}")
    text = ("in int8: " + ", ".join(parts)) if parts else "nothing is quantized"
    fallen = fallbacks(operators)
    return text + (f"; in float: {', '.join(found.name for found in fallen)}" if fallen else "")


def require_int8(operators: Sequence[Operator], target: str) -> None:
    """What `--strict` asks for.

    Raises:
        DeploymentError: an operator fell back; every one is named with its reason.
    """
    fallen = fallbacks(operators)
    if fallen:
        raise DeploymentError(
            f"{target} computes {len(fallen)} operator(s) in float: "
            + "; ".join(f"{found.name} ({found.kind}, {found.kernel}): {found.reason}" for found in fallen)
            + "; leave out --strict to accept that"
        )


def _is_of_interest(node: fx.Node, kind: Kind) -> bool:
    if kind == "addition":
        return len(node.all_input_nodes) == 2 and all(_is_feature_map(argument) for argument in node.all_input_nodes)
    if kind == "concatenation":
        return len(node.args[0]) > 1  # type: ignore[arg-type]
    if kind == "pooling" and node.target is aten.mean.dim:
        value = node.all_input_nodes[0].meta.get("val")
        return isinstance(value, Tensor) and value.dim() > 2
    return True


def _is_feature_map(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() >= 2 and value.is_floating_point()


def _quantized(node: fx.Node, kind: Kind) -> bool:
    if kind in WEIGHTED:
        x, weight = node.args[0], node.args[1]
        return (
            isinstance(x, fx.Node) and isinstance(weight, fx.Node) and _from(x, DEQUANTIZE) and _from(weight, DEQUANTIZE_WEIGHT)
        )
    return all(_from(argument, DEQUANTIZE) for argument in node.all_input_nodes if _is_feature_map(argument)) and all(
        _leads_to_quantize(user) for user in node.users
    )


def _from(node: fx.Node, target: Any) -> bool:
    while node.target in MOVES:
        node = node.all_input_nodes[0]
    return node.target is target


def _leads_to_quantize(node: fx.Node) -> bool:
    while node.target not in (QUANTIZE, DEQUANTIZE) and node.target not in KINDS and len(node.users) == 1:
        node = next(iter(node.users))
    return node.target is QUANTIZE


def _name(node: fx.Node, kind: Kind) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = next((str(entry[0]) for entry in reversed(list(stack.values())) if entry[0]), "")
    if kind in WEIGHTED:
        return path or node.name
    return f"{path}.{kind}" if path else kind
