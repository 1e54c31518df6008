"""Finished units on disk, addressed by everything that led to them.

The key of a unit is the hash of the key before it and of the unit itself with its bits; the first key is the hash of the graph,
the weights, the calibration images, the settings and the seed. Two runs that agree up to a unit share its file: a run that was
killed continues there, the passes of granularity `loss` share the units that they have in common, and trials those in front of
the first one whose bits differ. The random numbers of a unit come from its key too, so a resumed run ends bit-identical to one
that was never interrupted. The pass end to end is kept like a unit, and its state on the way besides, since it can take as long
as all units together.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from inc_clusterq.attributes import attribute
from inc_clusterq.checksum import checksum, content
from inc_clusterq.errors import OutputError
from inc_clusterq.output import replace_file
from inc_clusterq.reconstruction.fake_quantize import ActivationQuantizer, BiasCorrection, WeightQuantizer
from inc_clusterq.reconstruction.graph import Unit
from inc_clusterq.reconstruction.quantizers import QuantizedGraph, Simulated
from inc_clusterq.reconstruction.settings import ReconstructionSettings
from inc_clusterq.resuming import State

logger = logging.getLogger(__name__)

CHECKSUM, TORCH, SECONDS = "sha256", "torch", "seconds"  # keys in a file's metadata
FORMAT = 9  # raised whenever the meaning of a file or the course of the optimisation changes
# These choose units, where their tensors are kept, or what comes after the last of them.
NOT_THE_UNITS = {
    "granularity",
    "explicit_units",
    "top_k",
    "stack_layers",
    "stride_factor",
    "memory_budget",
    "end_to_end_features",
    "end_to_end_iterations",
    "end_to_end_learning_rate",
}


@dataclass(frozen=True)
class UnitStore:
    """Folder of finished units; None keeps nothing."""

    folder: Path | None = None

    def start(self, quantized: QuantizedGraph, inputs: Tensor, settings: ReconstructionSettings, seed: int) -> Chain:
        """The chain before its first unit."""
        digest = hashlib.sha256()
        chosen = {key: value for key, value in settings.model_dump().items() if key not in NOT_THE_UNITS}
        digest.update(json.dumps([FORMAT, seed, chosen], sort_keys=True).encode())
        digest.update(quantized.graph_module.code.encode())  # which has the operators' arguments
        for node in quantized.graph_module.graph.nodes:
            if node.op == "get_attr":  # weights and biases
                digest.update(content(attribute(quantized.graph_module, str(node.target))))
        digest.update(content(inputs))
        if inputs.device.type != "cpu":  # it rounds in its own way, and draws other numbers
            digest.update(inputs.device.type.encode())
        return Chain(self.folder, digest.hexdigest())


@dataclass(frozen=True)
class Chain:
    """All units up to one of them, as a key."""

    folder: Path | None
    key: str

    def next(self, unit: Unit, settings: str = "") -> Chain:
        """The chain with one more unit; `settings` are those that this unit has for itself."""
        return Chain(self.folder, hashlib.sha256(f"{self.key} {unit.start} {unit.nodes}{settings}".encode()).hexdigest())

    def generator(self, device: torch.device) -> torch.Generator:
        """The unit's own source of random numbers."""
        return torch.Generator(device).manual_seed(int(self.key[:15], 16))

    def restore(self, module: nn.Module) -> float | None:
        """Set the unit's quantizers to what is on disk, and tell the seconds that it took; None where nothing whole is."""
        if self.folder is None or not self._file.exists():
            return None
        try:
            state, about = _read(self._file)
            seconds = float(about[SECONDS])
            found = [(quantizer, _values(state, name, quantizer)) for name, quantizer in _named_quantizers(module)]
        except (SafetensorError, KeyError, RuntimeError, ValueError, OSError) as error:
            logger.warning("%s cannot be used (%s); the unit is computed again", self._file, error)
            return None
        for quantizer, values in found:  # all of them or none
            quantizer.fix(*values)
        return seconds

    def keep(self, module: nn.Module, seconds: float) -> None:
        """Write the unit's quantizers and what they took; the file appears when it is whole, and `keep_state`'s goes."""
        if self.folder is None:
            return
        state: dict[str, Tensor] = {}
        for name, quantizer in _named_quantizers(module):
            if isinstance(quantizer, BiasCorrection):
                state[f"{name}.shift"] = quantizer.shift.cpu()
                state[f"{name}.unit"] = quantizer.unit.cpu()
            elif isinstance(quantizer, WeightQuantizer):
                state[f"{name}.integers"] = quantizer.integers.to("cpu", torch.int8)
                state[f"{name}.scale"] = quantizer.start_scale.cpu()
            else:
                scale, zero_point = quantizer.deployed()
                state[f"{name}.scale"] = torch.tensor(scale)
                state[f"{name}.zero_point"] = torch.tensor(zero_point)
        _write(self._file, state, {SECONDS: f"{seconds:.3f}"})
        self._unfinished.unlink(missing_ok=True)

    def found_state(self) -> State | None:
        """What `keep_state` has kept last of a unit on its way, on the CPU; None where nothing whole is."""
        if self.folder is None or not self._unfinished.exists():
            return None
        try:
            return _read(self._unfinished)[0]
        except (SafetensorError, ValueError, OSError) as error:
            logger.warning("%s cannot be used (%s); the unit is begun anew", self._unfinished, error)
            return None

    def keep_state(self, state: State) -> None:
        """Write from where a unit on its way goes on, in place of what was kept before."""
        if self.folder is not None:
            _write(self._unfinished, {name: tensor.detach().cpu() for name, tensor in state.items()}, {})

    @property
    def _file(self) -> Path:
        assert self.folder is not None
        return self.folder / f"{self.key}.safetensors"

    @property
    def _unfinished(self) -> Path:
        assert self.folder is not None
        return self.folder / f"{self.key}.unfinished.safetensors"


def _named_quantizers(module: nn.Module) -> list[tuple[str, Simulated]]:
    """Each quantizer and bias correction once, under the first of its names in graph order."""
    named = module.named_modules()
    return [(name, child) for name, child in named if isinstance(child, (ActivationQuantizer, WeightQuantizer, BiasCorrection))]


def _values(state: dict[str, Tensor], name: str, quantizer: Simulated) -> tuple[Any, ...]:
    """What `fix` takes, out of a file."""
    if isinstance(quantizer, BiasCorrection):
        shift, unit = (state[f"{name}.{key}"].to(quantizer.shift).reshape(quantizer.shift.shape) for key in ("shift", "unit"))
        return shift, unit
    scale = state[f"{name}.scale"]
    if isinstance(quantizer, WeightQuantizer):
        integers = state[f"{name}.integers"].to(quantizer.integers).reshape(quantizer.integers.shape)
        return integers, scale.to(quantizer.start_scale).reshape(quantizer.start_scale.shape)
    return float(scale), int(state[f"{name}.zero_point"])


def _write(file: Path, state: dict[str, Tensor], about: dict[str, str]) -> None:
    state = {name: tensor.contiguous() for name, tensor in state.items()}  # weights lie in memory as the user's do
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, save(state, {**about, CHECKSUM: checksum(state), TORCH: str(torch.__version__)}))
    except OSError as error:
        raise OutputError(f"cannot write to the workspace {file.parent}: {error.strerror or error}") from error


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a unit's file and what is told of them; ValueError where they are not those that were written.

    Another version of torch would have computed other last digits: with units of both, no job could be repeated to the bit.
    """
    state = load_file(file)
    with safe_open(file, "pt") as opened:
        about: dict[str, str] = opened.metadata() or {}
    if about.get(CHECKSUM) != checksum(state):
        raise ValueError("its checksum is wrong")
    if about.get(TORCH) != str(torch.__version__):
        raise ValueError(f"it was made with torch {about.get(TORCH)}, and this is {torch.__version__}")
    return state, about
