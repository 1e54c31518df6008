"""Which integer instructions the processor has, and what follows from them.

Without VNNI or AMX, an 8-bit product is formed by an instruction that adds two of them in 16 bits and saturates there:
255 x 127 x 2 = 64,770 does not fit into 32,767, so that kernels for such machines lose the largest sums without a word.
With 7-bit weights nothing can be lost: 255 x 64 x 2 = 32,640. oneDNN (Inductor, OpenVINO) and ONNX Runtime share this.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SAFE_WEIGHT_BITS = 7
X86 = {"x86_64", "AMD64", "i686"}
VNNI = {"avx512_vnni", "avx_vnni"}
AMX = {"amx_int8"}
BLOCKS = {"avx512bw", "avx_vnni"}
OTHERS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


@dataclass(frozen=True)
class Cpu:
    """A processor as the system describes it."""

    model: str
    machine: str
    flags: frozenset[str]

    @property
    def vnni(self) -> bool:
        """It adds four 8-bit products in 32 bits."""
        return bool(self.flags & VNNI)

    @property
    def amx(self) -> bool:
        """It multiplies tiles of 8-bit integers."""
        return bool(self.flags & AMX)

    def __str__(self) -> str:
        """The model, and its integer instructions in words."""
        found = [name for name in OTHERS if name in self.flags]
        return f"{self.model}: VNNI {'yes' if self.vnni else 'no'}, AMX {'yes' if self.amx else 'no'}" + (
            f", {', '.join(found)}" if found else ""
        )


@cache
def cpu(description: Path = Path("/proc/cpuinfo")) -> Cpu:
    """This machine's processor; without flags where the system does not tell them."""
    try:
        lines = description.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    return Cpu(values.get("model name", "unknown processor"), platform.machine(), frozenset(values.get("flags", "").split()))


def overflows(processor: Cpu) -> bool:
    """Whether its kernels lose large sums of 8-bit weights; False where the system does not tell its instructions."""
    return processor.machine in X86 and bool(processor.flags) and not (processor.vnni or processor.amx)


def multiplies_blocks(processor: Cpu) -> bool:
    """Whether oneDNN multiplies integers block by block, and does not leave that to its older routines.

    These multiply the two scales by each other before the sum, and so round otherwise.
    """
    return processor.machine not in X86 or not processor.flags or bool(processor.flags & BLOCKS)


def range_warning(processor: Cpu, weight_bits: Sequence[int]) -> str | None:
    """What to say of a model with these weights on this processor; None where nothing can be lost."""
    if not overflows(processor) or max(weight_bits, default=0) <= SAFE_WEIGHT_BITS:
        return None
    return (
        f"{processor.model} has neither VNNI nor AMX: its int8 kernels overflow on 8-bit weights, and this model has some. "
        "Quantize again with quantization.reduce_range: true (in Python weight_ceiling=7), which keeps weights to 7 bits"
    )
