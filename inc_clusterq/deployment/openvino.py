"""The target `openvino`: the quantize-dequantize ONNX graph as torch exports it, in OpenVINO's own format (CPU plugin).

OpenVINO fuses the explicit clamps and residual additions into its int8 kernels by itself. It computes what is left in
bfloat16 on machines that have it, unless it is told not to: that alone moves the logits of a 4-bit network by 2 % of their
range. The loader here sets `INFERENCE_PRECISION_HINT` to f32; whoever loads the file without it must do the same.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from inc_clusterq.deployment.extras import require
from inc_clusterq.deployment.onnx import OUTPUT, to_onnx
from inc_clusterq.deployment.operators import Kind, Operator, SourceOperator, describe, node_name, source_operators
from inc_clusterq.errors import DeploymentError, ResultError

EXTRA = "openvino"
MODEL, WEIGHTS = "model.xml", "model.bin"
# Pinned threads wait for their processor where something else runs on it, several times as long as a call takes.
HINTS = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False}
INTEGERS = {"u8", "i8"}
PRODUCTS: dict[str, Kind] = {"Convolution": "convolution", "FullyConnected": "linear"}  # by OpenVINO's types of layers
Kernel = tuple[str, str, bool]  # type of layer, precision, whether it is of another operator into which this one was merged
REASON = 1000  # characters of what OpenVINO says
PLACES = re.compile(r"(Check '.*?' failed at|Exception from) \S+:\d+:? ?|FrontEnd API failed with \w+: ?")


def export(module: fx.GraphModule, folder: Path) -> None:
    """Write `model.xml` and `model.bin`.

    Raises:
        MissingDependencyError: openvino or the ONNX exporter is not installed.
        DeploymentError: OpenVINO does not take the model.
    """
    openvino = require("openvino", EXTRA)
    model = to_onnx(module)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "model.onnx"
        file.write_bytes(model.SerializeToString())
        try:
            converted = openvino.convert_model(str(file))
        except Exception as error:  # its exceptions share no base class
            raise DeploymentError(f"OpenVINO does not take the model: {type(error).__name__}: {_reason(error)}") from error
    try:
        openvino.save_model(converted, str(folder / MODEL), compress_to_fp16=False)
    except Exception as error:
        raise DeploymentError(f"OpenVINO cannot write {MODEL}: {_reason(error)}") from error


class OpenVinoModel:
    """A compiled OpenVINO model, called as a torch module is."""

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled

    def __call__(self, inputs: Tensor) -> Tensor:
        outputs = self.compiled(inputs.detach().cpu().numpy())[0]
        return torch.from_numpy(outputs.copy())  # the buffer is the next call's too


def load(folder: Path, threads: int | None = None) -> OpenVinoModel:
    """What `export` has written, on the CPU plugin, with the float parts in float32."""
    openvino = require("openvino", EXTRA)
    if not (folder / MODEL).is_file():
        raise ResultError(f"{folder} holds no {MODEL}; `inc-clusterq export RESULT --to openvino` writes one")
    hints: dict[str, Any] = dict(HINTS)
    if threads is not None:
        hints["INFERENCE_NUM_THREADS"] = threads
    try:
        core = openvino.Core()
        return OpenVinoModel(core.compile_model(core.read_model(str(folder / MODEL)), "CPU", hints))
    except Exception as error:  # its exceptions share no base class
        raise DeploymentError(f"OpenVINO cannot open {folder / MODEL}: {_reason(error)}") from error


def operators(module: fx.GraphModule, folder: Path) -> list[Operator]:
    """What OpenVINO made of each operator: read from the graph that runs."""
    runtime = load(folder).compiled.get_runtime_model()
    kernels: dict[str, Kernel] = {}
    named: list[tuple[set[str], Kernel]] = []
    for operation in runtime.get_ordered_ops():
        facts = {key: _text(value) for key, value in operation.get_rt_info().items()}
        if "layerType" not in facts:
            continue
        names = [name.partition("/")[0] for name in facts.get("originalLayersNames", "").split(",") if name]
        layer, precision = facts["layerType"], facts.get("runtimePrecision", "")
        named.append((set(names), (layer, precision, False)))
        for position, name in enumerate(names):
            kernels.setdefault(name, (layer, precision, position > 0))
    sources = source_operators(module)
    found = {source.node: kernels.get(node_name(source)) for source in sources}
    (output,) = next(node for node in module.graph.nodes if node.op == "output").all_input_nodes
    if found.get(output.name, ...) is None:  # the last operator bears the name of the model's output
        found[output.name] = kernels.get(OUTPUT)
    _match_renamed(sources, found, named)
    return [_operator(source, found[source.node]) for source in sources]


def _match_renamed(
    sources: list[SourceOperator], found: dict[str, Kernel | None], named: list[tuple[set[str], Kernel]]
) -> None:
    """Give products that bear the name of what was merged into them, a factor for example, to those that are missing, in order.

    Where there are not as many of a kind, which is which is unknown, and none is given.
    """
    known = {node_name(source) for source in sources} | {OUTPUT}
    for layer, kind in PRODUCTS.items():
        missing = [source.node for source in sources if source.kind == kind and found[source.node] is None]
        renamed = [kernel for names, kernel in named if kernel[0] == layer and not names & known]
        if len(missing) == len(renamed):
            found.update(zip(missing, renamed, strict=True))


def _operator(source: SourceOperator, kernel: Kernel | None) -> Operator:
    if kernel is None:
        return describe(source, "float", "not found", "OpenVINO merged it with another operator")
    layer, precision, merged = kernel
    text = f"{layer} {precision}"
    if precision in INTEGERS:
        return describe(source, "fused" if merged and source.kind not in ("convolution", "linear") else "int8", text)
    if source.kind == "addition" and not source.quantizable:
        return describe(source, "float", text, "the evaluated model adds before it rounds")
    return describe(source, "float", text, f"OpenVINO chose {precision} for it")


def _reason(error: Exception) -> str:
    """What OpenVINO says, without the places in its own sources, which come first and are longer than the rest."""
    said = PLACES.sub("", " ".join(str(error).split()))
    return said if len(said) <= REASON else f"{said[:REASON]} ..."


def _text(value: Any) -> str:
    return str(value.astype(str)) if hasattr(value, "astype") else str(value)
