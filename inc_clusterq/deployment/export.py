"""`inc-clusterq export`: a saved result for another run time, checked against the model that was evaluated.

The folder that is written holds the run time's own files and `export.json`: parity on inputs in and beyond the calibrated
range, what became of every operator, versions, and sizes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from inc_clusterq.cpu import cpu, range_warning
from inc_clusterq.deployment.arithmetic import kernel_arithmetic
from inc_clusterq.deployment.inductor import Compiled, Parity, check_parity
from inc_clusterq.deployment.operators import Operator, require_int8, summary
from inc_clusterq.deployment.packing import weight_bits
from inc_clusterq.deployment.saved import SavedModel, open_result
from inc_clusterq.deployment.targets import target
from inc_clusterq.environment import environment, installed
from inc_clusterq.errors import DeploymentError, ResultError
from inc_clusterq.inputs import InputSpec
from inc_clusterq.output import check_output, filled_whole
from inc_clusterq.progress import SILENT, Progress

REPORT = "export.json"
FORMAT = 1
IMAGES = 64


@dataclass(frozen=True)
class Exported:
    """What was written, and what was found."""

    target: str
    output: Path
    parity: Parity
    operators: tuple[Operator, ...]
    sizes: Mapping[str, int]  # bytes by file
    environment: Mapping[str, str]
    hint: str

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {
            "format": FORMAT,
            "target": self.target,
            "parity": asdict(self.parity),
            "summary": summary(self.operators),
            "operators": [{**asdict(found), "fell_back": found.fell_back} for found in self.operators],
            "sizes": dict(self.sizes),
            "environment": dict(self.environment),
            "hint": self.hint,
        }

    def print(self, console: Console) -> None:
        """Print what a person wants to know."""
        lines = [
            f"{self.target}: {summary(self.operators)}.",
            *self._in_float(),
            f"Against the evaluated model: {self.parity}.",
            f"{sum(self.sizes.values()) / 1024:.0f} KiB in {self.output}; {self.hint}.",
        ]
        for line in lines:
            console.print(line, soft_wrap=True, highlight=False, markup=False)

    def _in_float(self) -> list[str]:
        """One line for all operators that are in float for the same reason."""
        alike: dict[tuple[str, str], list[str]] = {}
        for found in self.operators:
            if found.precision == "float":
                alike.setdefault((found.kernel, found.reason), []).append(found.name)
        return [f"  In float ({kernel}): {', '.join(names)}: {reason}." for (kernel, reason), names in alike.items()]


def export(
    result: Path,
    to: str,
    *,
    output: Path | None = None,
    overwrite: bool = False,
    strict: bool = False,
    progress: Progress = SILENT,
) -> Exported:
    """Write the result in folder `result` for the target `to`, by default into a folder of that name inside it.

    Raises:
        ResultError: the result is missing, damaged, or of another version.
        OutputError: the output folder cannot be used.
        MissingDependencyError: the run time is not installed.
        DeploymentError: the run time does not take the model, or computes something else; with `strict` also where it
            computes a quantizable operator in float. Nothing is written then.
    """
    chosen = target(to)
    saved = open_result(result)
    output = output or result / to
    check_output(output, overwrite=overwrite, report=REPORT)
    with filled_whole(output, overwrite=overwrite, report=REPORT) as folder, progress.stage(f"Exporting to {to}", 3) as stage:
        chosen.write(saved, folder)
        sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
        stage.advance(1, "written")
        operators = tuple(chosen.operators(saved.module, folder))
        if strict:
            require_int8(operators, to)
        stage.advance(1, "counted")
        parity = _checked(saved, chosen.load(folder))
        stage.advance(1, "checked")
        versions = environment(installed(*chosen.packages))
        exported = Exported(to, output, parity, operators, sizes, versions, chosen.hint)
        (folder / REPORT).write_text(json.dumps(exported.as_dict(), indent=2) + "\n", encoding="utf-8")
    return exported


def _checked(saved: SavedModel, deployed: Compiled) -> Parity:
    """As `check_parity`; where this processor's kernels overflow on the model's weights, the error says so."""
    try:
        return check_parity(kernel_arithmetic(saved.module), deployed, parity_inputs(saved))
    except DeploymentError as error:
        warning = range_warning(cpu(), list(weight_bits(saved.program).values()))
        raise DeploymentError(f"{error}. {warning}" if warning else str(error)) from error


def parity_inputs(saved: SavedModel, images: int = IMAGES) -> Tensor:
    """Images like those of the calibration, inside the sensor's range: mixtures of the two that the program carries.

    Each is a random mixture with twice their contrast, shifted around; the same ones at each call.
    """
    try:
        described = saved.report["config"]["model"]["input"]
        low, high = described["range"]
        spec = InputSpec(tuple(described["shape"]), low, high, tuple(described["mean"]), tuple(described["std"]))
        ((examples,), _) = saved.program.example_inputs
    except (KeyError, TypeError, ValueError) as error:
        raise ResultError(
            f"result {saved.folder} is damaged: it does not say what the model's input is; run `inc-clusterq quantize` again"
        ) from error
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(images, len(examples), generator=generator).softmax(1)
    middle = examples.detach().mean()
    mixed = middle + 2 * torch.einsum("ne,e...->n...", weights, examples.detach() - middle)
    spatial = tuple(range(1, examples.dim() - 1))
    rolled = []
    for image in mixed:
        shifts = [int(torch.randint(image.shape[axis], (1,), generator=generator)) for axis in spatial]
        rolled.append(image.roll(shifts, spatial) if spatial else image)
    return torch.stack(rolled).clamp(*spec.bounds(mixed))
