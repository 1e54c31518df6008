"""The prepared graph with learnable quantizers in place of the host's observers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from inc_clusterq.reconstruction.bits import BitPlan, assign_bits
from inc_clusterq.reconstruction.cleanup import make_cuttable
from inc_clusterq.reconstruction.fake_quantize import ActivationQuantizer, Mode, WeightQuantizer
from inc_clusterq.reconstruction.graph import (
    Layer,
    Unit,
    attribute,
    partition,
    replace_observers,
)
from inc_clusterq.reconstruction.settings import ReconstructionSettings

Quantizer = ActivationQuantizer | WeightQuantizer


@dataclass(frozen=True)
class QuantizedGraph:
    """A graph whose quantizers are ours, its smallest units, and the bits of each quantizer."""

    graph_module: fx.GraphModule
    units: tuple[Unit, ...]
    bits: dict[str, int]


def quantizers(module: nn.Module) -> Iterator[Quantizer]:
    """Each quantizer of a module once, in graph order."""
    for child in module.modules():
        if isinstance(child, (ActivationQuantizer, WeightQuantizer)):
            yield child


def set_mode(module: nn.Module, mode: Mode) -> None:
    """Put every quantizer of a module into one mode."""
    for quantizer in quantizers(module):
        quantizer.mode = mode


@contextmanager
def in_mode(module: nn.Module, mode: Mode) -> Iterator[None]:
    """Every quantizer in `mode` for the length of a block, then as before."""
    before = [(quantizer, quantizer.mode) for quantizer in quantizers(module)]
    set_mode(module, mode)
    try:
        yield
    finally:
        for quantizer, old in before:
            quantizer.mode = old


def install_quantizers(graph_module: fx.GraphModule, plan: BitPlan, settings: ReconstructionSettings) -> QuantizedGraph:
    """Replace the observers of a prepared graph, in place; the quantizers start in float mode.

    Raises:
        ValueError: the graph holds no convolution or linear operator, or the plan names an unknown layer.
    """
    make_cuttable(graph_module)
    units = partition(graph_module)
    if not units:
        raise ValueError("the model has no convolution or linear operator that could be quantized")
    bits = assign_bits(graph_module, units, plan)
    weights: dict[str, Layer] = {
        layer.quantizer: layer for unit in units for layer in unit.layers if layer.quantizer is not None
    }

    bits.update({name: min(bits[name], settings.weight_ceiling) for name in weights})

    def make(name: str) -> nn.Module:
        if name not in weights:
            return ActivationQuantizer(bits.get(name, plan.activation), settings.range_norm)
        tensor = attribute(graph_module, weights[name].weight)
        return WeightQuantizer(tensor, bits[name], settings.range_norm, settings.learn_weight_scale)

    replace_observers(graph_module, make)
    return QuantizedGraph(graph_module, tuple(units), bits)


@torch.no_grad()
def initialise_activations(
    quantized: QuantizedGraph,
    inputs: Tensor,  # shape: (N, *shape)
    batch_size: int,
) -> None:
    """Set every activation's scale and zero point from what the float network does with `inputs`."""
    with in_mode(quantized.graph_module, Mode.OBSERVE):
        for batch in inputs.split(batch_size):
            quantized.graph_module(batch)
    for quantizer in quantizers(quantized.graph_module):
        if isinstance(quantizer, ActivationQuantizer):
            quantizer.initialise()
