"""The target `onnxruntime`: a quantize-dequantize ONNX file that plain ONNX Runtime runs in int8 (CPU, default options)."""

from __future__ import annotations

import logging
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from inc_clusterq.deployment.extras import require
from inc_clusterq.deployment.fusion import clamp_before_quantize
from inc_clusterq.deployment.operators import Kind, Operator, SourceOperator, describe, node_name, of_kind, source_operators
from inc_clusterq.deployment.saved import input_shape
from inc_clusterq.errors import DeploymentError, ResultError
from inc_clusterq.inputs import MOST_PER_BATCH
from inc_clusterq.quiet import quiet

aten = torch.ops.aten
EXTRA = "onnx"
MODEL = "model.onnx"
EXPORTER = ("onnx", "onnxscript")  # packages
INPUT, OUTPUT = "input", "logits"
OPSET = 20
MAP_AXES = 3  # of the least that a pooling reads: (N, C, L)
ONNX_KINDS: dict[str, Kind] = {
    "Conv": "convolution",
    "ConvTranspose": "convolution",
    "Gemm": "linear",
    "MatMul": "linear",
    "MaxPool": "pooling",
    "AveragePool": "pooling",
    "GlobalAveragePool": "pooling",
    "ReduceMean": "pooling",
    "Concat": "concatenation",
    "Add": "addition",
}
NAMED = {"addition", "concatenation"}  # kinds of which the exporter makes more than the module has: told by their names alone
INT8_KERNELS = {
    "QLinearConv",
    "QLinearMatMul",
    "QGemm",
    "MatMulIntegerToFloat",
    "QLinearAdd",
    "QLinearConcat",
    "QLinearAveragePool",
    "QLinearGlobalAveragePool",
}
MOVES = {"MaxPool", "NhwcMaxPool", "Concat"}  # in int8 where they read and write 8-bit tensors
QUIET = 3  # ONNX Runtime's log level: errors
TOKEN = re.compile(r"_token_\d+$")  # what ONNX Runtime appends to the name of a node that it makes of others


def to_onnx(module: fx.GraphModule) -> Any:  # an onnx.ModelProto
    """The module as torch exports it: a free batch dimension, quantize-dequantize nodes, operators named as in the module.

    Raises:
        MissingDependencyError: onnx or onnxscript is not installed.
        DeploymentError: an operator has no counterpart in ONNX.
    """
    for package in EXPORTER:
        require(package, EXTRA)
    module = deepcopy(module)
    clamp_before_quantize(module)
    _keep_axes_of_maxima(module)
    example = torch.zeros(2, *input_shape(module))
    shapes = ({0: torch.export.Dim("batch", min=1, max=MOST_PER_BATCH)},)
    try:
        # The exporter prints its progress and warns of its own internals.
        with warnings.catch_warnings(action="ignore"), quiet(logging.ERROR, "torch.onnx", "onnxscript", "onnx_ir"):
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                dynamic_shapes=shapes,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                verbose=False,
            )
    except Exception as error:  # the exporter raises whatever its stages raise
        reason = " ".join(str(error.__cause__ or error).split())
        raise DeploymentError(f"the model cannot be exported to ONNX: {type(error).__name__}: {reason[:300]}") from error
    assert program is not None
    model = program.model_proto
    _separate_zero_points(model)
    _name_operators(model, source_operators(module))
    return model


def export(module: fx.GraphModule, folder: Path) -> None:
    """Write `model.onnx`, as ONNX Runtime needs it for its int8 kernels."""
    for package in ("onnxruntime", *EXPORTER):
        require(package, EXTRA)
    from inc_clusterq.deployment.onnx_rewrite import rewrite  # which needs them

    model = rewrite(to_onnx(module))
    (folder / MODEL).write_bytes(model.SerializeToString())


class OnnxModel:
    """A session over `model.onnx`, called as a torch module is."""

    def __init__(self, session: Any) -> None:
        self.session = session

    def __call__(self, inputs: Tensor) -> Tensor:
        (outputs,) = self.session.run(None, {INPUT: inputs.detach().cpu().numpy()})
        return torch.from_numpy(outputs)


def load(folder: Path, threads: int | None = None) -> OnnxModel:
    """What `export` has written, on ONNX Runtime's CPU provider."""
    return OnnxModel(_session(folder, threads))


def operators(module: fx.GraphModule, folder: Path) -> list[Operator]:
    """What ONNX Runtime made of each operator: read from the graph that it optimised."""
    import onnx

    sources = source_operators(module)
    with tempfile.TemporaryDirectory() as scratch:
        optimised = Path(scratch) / "optimised.onnx"
        _session(folder, None, optimised)
        model = onnx.load(optimised)
    written = onnx.load(folder / MODEL)
    names = {node.name for node in written.graph.node}
    dequantized = {name for node in model.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    kernels: dict[str, tuple[str, bool]] = {}
    for node in model.graph.node:
        name = node.name.partition("/")[0]
        name = name if name in names else TOKEN.sub("", name)
        real = any(value in dequantized for value in node.input)
        in_int8 = node.op_type in INT8_KERNELS or (node.op_type in MOVES and not real)
        kernels.setdefault(name, (node.op_type, in_int8))
    rounded = {node.input[0] for node in written.graph.node if node.op_type == "QuantizeLinear"}
    unrounded = {node.name for node in written.graph.node if node.op_type == "Conv" and node.output[0] not in rounded}
    return [_operator(source, kernels.get(node_name(source)), node_name(source) in unrounded) for source in sources]


def _operator(source: SourceOperator, kernel: tuple[str, bool] | None, unrounded: bool) -> Operator:
    if kernel is None:
        return describe(source, "float", "not found", "ONNX Runtime merged it with another operator")
    name, in_int8 = kernel
    if in_int8:
        return describe(source, "int8", name)
    if source.kind == "addition" and not source.quantizable:
        reason = "the evaluated model adds before it rounds; the product that it adds comes from an int8 kernel"
    elif source.kind == "convolution" and unrounded:
        reason = "its unrounded output is read, and ONNX Runtime has no int8 kernel for that where channels are grouped"
    else:
        reason = "ONNX Runtime found no quantize node around it that its int8 kernel needs"
    return describe(source, "float", name, reason)


def _session(folder: Path, threads: int | None, optimised: Path | None = None) -> Any:
    runtime = require("onnxruntime", EXTRA)
    settings = runtime.SessionOptions()
    settings.log_severity_level = QUIET
    if threads is not None:
        settings.intra_op_num_threads = threads
    if optimised is not None:
        settings.optimized_model_filepath = str(optimised)
    file = folder / MODEL
    if not file.is_file():
        raise ResultError(f"{folder} holds no {MODEL}; `inc-clusterq export RESULT --to onnxruntime` writes one")
    try:
        return runtime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base class
        reason = " ".join(str(error).split())[:300]
        raise DeploymentError(f"ONNX Runtime cannot open {file}: {reason}") from error


def _keep_axes_of_maxima(module: fx.GraphModule) -> None:
    """Take global maxima with their axes, which are then dropped: without, OpenVINO makes something else of 8-bit ones."""
    graph = module.graph
    for node in graph.find_nodes(op="call_function", target=aten.amax.default):
        x, axes, keeps_axes = (*node.args, [], False)[:3]
        if keeps_axes or not axes:
            continue
        node.args = (x, axes, True)
        with graph.inserting_after(node):
            dropped = graph.call_function(aten.squeeze.dims, (node, axes))
        dropped.meta.update(node.meta)
        node.replace_all_uses_with(dropped, delete_user_cb=lambda user, kept=dropped: user is not kept)
    module.recompile()


def _separate_zero_points(model: Any) -> None:
    """Give the zero points of each weight a constant of their own.

    The exporter makes one of equal ones, and OpenVINO leaves those in float that a convolution and a linear operator share.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for number, node in enumerate(model.graph.node):
        if node.op_type == "DequantizeLinear" and node.input[0] in constants and len(node.input) > 2:
            own = model.graph.initializer.add()
            own.CopyFrom(constants[node.input[2]])
            own.name = node.input[2] = f"{own.name}_{number}"


def _constants(model: Any) -> set[str]:
    """Names of all values that follow from the model's own numbers alone."""
    constants = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if all(name in constants for name in node.input):
            constants.update(node.output)
    return constants


def _name_operators(model: Any, sources: Sequence[SourceOperator]) -> None:
    """Name nodes after the operators they came from, in order, and drop what the exporter notes of the user's source files."""
    constants = _constants(model)
    axes = {value.name: len(value.type.tensor_type.shape.dim) for value in model.graph.value_info}
    by_kind: dict[Kind, Iterator[SourceOperator]] = {kind: of_kind(sources, kind) for kind in set(ONNX_KINDS.values())}
    exact = {f"node_{source.node}": source for source in sources}
    for number, node in enumerate(model.graph.node):
        del node.metadata_props[:]
        kind = ONNX_KINDS.get(node.op_type)
        source = exact.get(node.name)
        named = source is not None and source.kind == kind
        node.name = f"{node.op_type}:{number}"
        if kind is None or (kind in NAMED and not named):
            continue
        if kind == "linear" and not named and node.input[1] not in constants:  # a product of two feature maps
            continue
        if node.op_type == "ReduceMean" and axes.get(node.input[0], MAP_AXES) < MAP_AXES:  # of features, which is no pooling
            continue
        source = source if kind in NAMED else next(by_kind[kind], None)
        if source is not None:
            node.name = node_name(source)
    for value in [*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer]:
        del value.metadata_props[:]
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
