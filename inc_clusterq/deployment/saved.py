"""A result folder as `quantize` writes it, opened and checked: what every export, pack and bench starts from."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

# Imported for what it registers: without it the quantize nodes of a program are unknown, and Inductor has no int8 kernels.
import inc_clusterq.deployment.backend  # noqa: F401
from inc_clusterq.errors import ResultError
from inc_clusterq.output import RESULT
from inc_clusterq.quiet import quiet
from inc_clusterq.result import FORMAT

PROGRAM = "quantized_weight.pt"  # the host's name
HOST_CONFIG = "qconfig.json"


@dataclass(frozen=True)
class SavedModel:
    """The evaluated model, from disk."""

    folder: Path
    program: ExportedProgram
    module: fx.GraphModule
    report: Mapping[str, Any]  # result.json

    @property
    def shape(self) -> tuple[int, ...]:
        """One sample without the batch dimension."""
        return input_shape(self.module)


def open_result(folder: Path) -> SavedModel:
    """The model that `quantize` has saved in `folder`.

    Raises:
        ResultError: there is none, it is damaged, or another version wrote it.
    """
    report = read_report(folder)
    for name in (PROGRAM, HOST_CONFIG):
        if not (folder / name).is_file():
            raise ResultError(f"result {folder} is damaged: it has no {name}; run `inc-clusterq quantize` again")
    try:
        json.loads((folder / HOST_CONFIG).read_text(encoding="utf-8"))
        program = load_program(folder / PROGRAM)
    except Exception as error:  # torch raises whatever a damaged archive leads to
        raise ResultError(
            f"result {folder} is damaged: {type(error).__name__}: {' '.join(str(error).split())[:200]}; "
            "run `inc-clusterq quantize` again"
        ) from error
    return SavedModel(folder, program, as_module(program), report)


def read_report(folder: Path) -> Mapping[str, Any]:
    """`result.json` of a result folder; ResultError where it is missing, damaged, or of another version."""
    if not folder.is_dir():
        raise ResultError(f"there is no result folder {folder}; `inc-clusterq quantize` makes one")
    file = folder / RESULT
    if not file.is_file():
        raise ResultError(f"{folder} holds no {RESULT}; name the output folder of `inc-clusterq quantize`")
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ResultError(f"result {folder} is damaged: {RESULT}: {error}; run `inc-clusterq quantize` again") from error
    found = report.get("format") if isinstance(report, dict) else None
    if found != FORMAT:
        raise ResultError(
            f"result {folder} has format {found!r} and this version reads format {FORMAT}; run `inc-clusterq quantize` again"
        )
    return dict(report)


def load_program(file: Path) -> ExportedProgram:
    """An exported program from disk."""
    with (
        quiet(logging.CRITICAL, "torch.export"),  # of a damaged file it writes a traceback before it raises
        file.open("rb") as stream,  # a name that does not end in .pt2 makes torch warn
    ):
        return torch.export.load(stream)


def as_module(program: ExportedProgram) -> fx.GraphModule:
    """A program as a module that can be called, and whose graph can be read."""
    module = program.module()
    assert isinstance(module, fx.GraphModule)
    return module


def input_shape(module: fx.GraphModule) -> tuple[int, ...]:
    """Shape of one input sample of an exported module, without the batch dimension."""
    value = next(node for node in module.graph.nodes if node.op == "placeholder").meta["val"]
    assert isinstance(value, Tensor)
    return tuple(int(size) for size in value.shape[1:])
