"""Capacity of a unit (MRECG, arXiv 2303.11906, Sec. 3.3).

ModCap, data-free (Eq. 8):  CM_i = sum over the convolutions j of unit i of  params_j * bits_j * alpha_j,
alpha = 1 for stride 1 and `stride_factor` beyond, since a strided convolution equals a stride-1 one with a larger kernel.
It compares topologically homogeneous units only: the same number of convolutions on the main path, of the same kind and
dilation; kernel size and channels may differ, and the stride is what alpha is for.
The loss metric, data-dependent: CM_i = the reconstruction loss of unit i after one pass at base granularity.
"""

from __future__ import annotations

from collections.abc import Mapping

from inc_clusterq.reconstruction.graph import Unit


def modcap(unit: Unit, bits: Mapping[str, int], stride_factor: float) -> float:
    """ModCap of one unit; `bits` maps a weight's quantizer to its bits, a weight in float counts 32."""
    total = 0.0
    for layer in unit.layers:
        alpha = stride_factor if layer.stride > 1 else 1.0
        total += layer.parameters * (bits[layer.quantizer] if layer.quantizer else 32) * alpha
    return total


def homogeneous(first: Unit, second: Unit) -> bool:
    """Whether ModCap may compare the two units."""
    return _topology(first) == _topology(second)


def _topology(unit: Unit) -> list[tuple[str, int]]:
    by_name = {layer.name: layer for layer in unit.layers}
    return [(by_name[name].kind, by_name[name].dilation) for name in unit.path]
