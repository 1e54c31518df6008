"""The run times that a result can be exported to, by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx

from inc_clusterq.deployment import onnx, openvino
from inc_clusterq.deployment.inductor import Compiled
from inc_clusterq.deployment.inductor_operators import compile_and_list
from inc_clusterq.deployment.operators import Operator
from inc_clusterq.deployment.saved import HOST_CONFIG, PROGRAM, SavedModel, as_module, input_shape, load_program
from inc_clusterq.errors import ConfigError


@dataclass(frozen=True)
class Target:
    """How a run time takes a saved model."""

    name: str
    packages: tuple[str, ...]  # whose versions matter
    write: Callable[[SavedModel, Path], None]
    load: Callable[[Path], Compiled]
    operators: Callable[[fx.GraphModule, Path], list[Operator]]
    hint: str  # what whoever deploys the files must know


def _copy(saved: SavedModel, folder: Path) -> None:
    for name in (PROGRAM, HOST_CONFIG):
        shutil.copyfile(saved.folder / name, folder / name)


def load_inductor(folder: Path) -> Compiled:
    """The saved program, compiled at the first call of each batch size with the weights frozen in."""
    from inc_clusterq.deployment.inductor import compile_frozen

    program = load_program(folder / PROGRAM)
    compiled: dict[tuple[int, ...], Compiled] = {}

    def call(inputs: Tensor) -> Tensor:
        shape = tuple(inputs.shape)
        if shape not in compiled:  # a module of its own for each, since torch counts the recompilations of one
            compiled[shape] = compile_frozen(as_module(program), inputs)
        with torch.no_grad():
            return compiled[shape](inputs)

    return call


def _inductor_operators(module: fx.GraphModule, folder: Path) -> list[Operator]:
    return compile_and_list(module, torch.zeros(1, *input_shape(module)))[1]


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            "inductor",
            ("torch", "torchao"),
            _copy,
            load_inductor,
            _inductor_operators,
            "load it with neural_compressor.torch.quantization.load and compile it with torch.compile(..., dynamic=False) "
            "under torch.no_grad, with torch._inductor.config.freezing = True; without that, everything is computed in float",
        ),
        Target(
            "onnxruntime",
            ("onnxruntime", "onnx"),
            lambda saved, folder: onnx.export(saved.module, folder),
            onnx.load,
            onnx.operators,
            "open model.onnx with CPUExecutionProvider and default session options",
        ),
        Target(
            "openvino",
            ("openvino",),
            lambda saved, folder: openvino.export(saved.module, folder),
            openvino.load,
            openvino.operators,
            "compile model.xml for CPU with INFERENCE_PRECISION_HINT=f32; without it, machines with bfloat16 round what is "
            "not int8 to it",
        ),
    )
}


def target(name: str) -> Target:
    """A target by name; ConfigError lists what there is."""
    if name not in TARGETS:
        raise ConfigError(f"there is no target {name!r}; there are {', '.join(TARGETS)}")
    return TARGETS[name]
