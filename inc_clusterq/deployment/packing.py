"""Packed storage: each weight takes as many bits as it has, beside the host's own file that stores a byte for each.

`packed.safetensors` holds one stream of bits per weight tensor, the other tensors as they are, the program without its
weights, and a manifest. Integers w of b bits are stored as w + 2^(b - 1), lowest bit first, so that 4-bit weights lie two to
a byte, 2-bit weights four to a byte, and 3 bits take three. It is unpacked at load and equals the saved model to the bit; no
x86 library computes with packed convolution weights, so packing saves storage and no time.
"""

from __future__ import annotations

import io
import json
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, fx
from torch.export import ExportedProgram

from inc_clusterq.checksum import checksum
from inc_clusterq.deployment.backend import DEQUANTIZE_WEIGHT
from inc_clusterq.deployment.qdq import archived, forget_sources
from inc_clusterq.deployment.saved import PROGRAM, as_module, open_result
from inc_clusterq.errors import OutputError, ResultError
from inc_clusterq.output import replace_file

PACKED = "packed.safetensors"
FORMAT = 3
PROGRAM_KEY = "program"
STORED_BITS = 8


@dataclass(frozen=True)
class Packed:
    """Sizes in bytes."""

    file: Path
    float_size: int  # every weight and bias in float32
    plain_size: int  # the host's file
    packed_size: int
    weights: Mapping[int, int]  # bits -> number of weights
    program_size: int  # of the packed file: what is neither weights nor biases nor scales

    def print(self, console: Console) -> None:
        """Print the table."""
        table = Table(title="Size on disk", title_justify="left")
        table.add_column("form")
        for heading in ("KiB", "of float32"):
            table.add_column(heading, justify="right")
        for name, size in (
            ("float32 weights alone", self.float_size),
            (f"{PROGRAM}, the host's own", self.plain_size),
            (PACKED, self.packed_size),
            ("  of it the program", self.program_size),
        ):
            table.add_row(name, f"{size / 1024:.1f}", f"{size / self.float_size:.1%}")
        console.print(table)
        counts = ", ".join(f"{count} of {bits} bits" for bits, count in sorted(self.weights.items()))
        console.print(f"Weights: {counts}. Written to {self.file}", soft_wrap=True, highlight=False, markup=False)


def pack_integers(
    integers: Tensor,  # int8, any shape
    bits: int,
) -> Tensor:  # uint8, shape: (ceil(n bits / 8),)
    """The stream of bits of signed integers of `bits` bits, lowest bit first."""
    lowest = -(2 ** (bits - 1))
    levels = (integers.detach().cpu().flatten().to(torch.int16) - lowest).numpy()
    if levels.size and (levels.min() < 0 or levels.max() >= 2**bits):
        raise ValueError(f"integers from {levels.min() + lowest} to {levels.max() + lowest} do not fit {bits} bits")
    stream = np.unpackbits(levels.astype(np.uint8)[:, None], axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(stream.reshape(-1), bitorder="little"))


def unpack_integers(
    stream: Tensor,  # uint8, as from `pack_integers`
    bits: int,
    shape: tuple[int, ...],
) -> Tensor:  # int8
    """The inverse of `pack_integers`."""
    count = int(torch.Size(shape).numel())
    needed = -(-count * bits // STORED_BITS)
    if stream.numel() != needed:
        raise ValueError(f"{count} integers of {bits} bits take {needed} bytes, not {stream.numel()}")
    flat = np.unpackbits(stream.numpy(), count=count * bits, bitorder="little").reshape(count, bits)
    levels = np.packbits(flat, axis=1, bitorder="little")[:, 0].astype(np.int16)
    return torch.from_numpy((levels - 2 ** (bits - 1)).astype(np.int8)).reshape(shape)


def weight_bits(program: ExportedProgram) -> dict[str, int]:
    """Names of the program's integer weights, and how many bits each has."""
    held = {**program.graph_signature.inputs_to_buffers, **program.graph_signature.inputs_to_parameters}
    found: dict[str, int] = {}
    for node in program.graph.nodes:
        if node.target is DEQUANTIZE_WEIGHT and str(node.args[0]) in held:
            lowest, highest = int(node.args[4]), int(node.args[5])
            found[held[str(node.args[0])]] = (highest - lowest).bit_length()
    return found


def pack(result: Path, *, overwrite: bool = False) -> Packed:
    """Write `packed.safetensors` into a result folder.

    Raises:
        ResultError: the result is missing, damaged, or of another version.
        OutputError: the file is there already, or cannot be written.
    """
    saved = open_result(result)
    file = result / PACKED
    if file.exists() and not overwrite:
        raise OutputError(f"{file} is there already; add --overwrite to replace it")
    bits = weight_bits(saved.program)
    tensors: dict[str, Tensor] = {}
    entries: dict[str, dict[str, Any]] = {}
    first: dict[str, str] = {}  # content -> the first weight that holds it: a shared one has a copy for each reader
    for name, tensor in saved.program.state_dict.items():
        entry: dict[str, Any] = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        if name in bits and (same := first.setdefault(f"{bits[name]} {checksum({'': tensor})}", name)) != name:
            entry["same_as"] = same
        elif name in bits and tensor.dtype is torch.int8:
            entry["bits"] = bits[name]
            tensors[name] = pack_integers(tensor, bits[name])
        elif tensor.numel() and bool((tensor == 0).all()):
            entry["zeros"] = True  # zero points of symmetric weights
        else:
            tensors[name] = tensor.detach().contiguous()
        entries[name] = entry
    tensors[PROGRAM_KEY] = _without_weights(saved.program)
    manifest = {"format": FORMAT, "tensors": entries, "sha256": checksum(tensors)}
    data = save(tensors, metadata={"manifest": json.dumps(manifest)})
    try:
        replace_file(file, data)
    except OSError as error:
        raise OutputError(f"{file} cannot be written: {error.strerror or error}") from error
    counts: Counter[int] = Counter()
    kept = {name: tensor.numel() for name, tensor in saved.program.state_dict.items() if "same_as" not in entries[name]}
    for name, width in bits.items():
        counts[width] += kept.get(name, 0)
    parameters = saved.program.graph_signature.parameters
    float_size = 4 * sum(count for name, count in kept.items() if name in bits or name in parameters)
    return Packed(file, float_size, (result / PROGRAM).stat().st_size, len(data), counts, int(tensors[PROGRAM_KEY].numel()))


def load_packed(file: Path) -> fx.GraphModule:
    """The model that was packed, equal to the saved one to the bit.

    Raises:
        ResultError: the file is missing, damaged, or of another version.
    """
    try:
        with safe_open(file, framework="pt") as archive:
            manifest = json.loads((archive.metadata() or {})["manifest"])
            tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118  # no mapping
    except FileNotFoundError as error:
        raise ResultError(f"there is no {file}; `inc-clusterq pack` writes one") from error
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise ResultError(f"{file} is damaged: {error}; run `inc-clusterq pack` again") from error
    if manifest.get("format") != FORMAT:
        raise ResultError(f"{file} has format {manifest.get('format')!r} and this version reads format {FORMAT}")
    if manifest["sha256"] != checksum(tensors):
        raise ResultError(f"{file} is damaged: its checksum does not match; run `inc-clusterq pack` again")
    program = torch.export.load(io.BytesIO(zlib.decompress(tensors[PROGRAM_KEY].numpy().tobytes())))
    for name, entry in manifest["tensors"].items():
        shape = tuple(entry["shape"])
        if "same_as" in entry:
            value = program.state_dict[entry["same_as"]]
        elif entry.get("zeros"):
            value = torch.zeros(shape, dtype=getattr(torch, entry["dtype"]))
        elif "bits" in entry:
            value = unpack_integers(tensors[name], entry["bits"], shape)
        else:
            value = tensors[name]
        program.state_dict[name].data.copy_(value)
    return as_module(program)


def _without_weights(program: ExportedProgram) -> Tensor:
    """The program with zeros for its weights, which compress to next to nothing, and without notes of the user's sources."""
    stripped = torch.export.load(io.BytesIO(archived(program)))
    for tensor in stripped.state_dict.values():
        tensor.data.zero_()
    forget_sources(stripped.graph_module)
    stripped._example_inputs = None
    return torch.frombuffer(bytearray(zlib.compress(archived(stripped), 9)), dtype=torch.uint8)
