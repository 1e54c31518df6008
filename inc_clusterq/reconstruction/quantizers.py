"""The prepared graph with learnable quantizers in place of the host's observers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from inc_clusterq.attributes import attribute, replace_attribute
from inc_clusterq.reconstruction.bits import BitPlan, assign_bits
from inc_clusterq.reconstruction.cleanup import make_cuttable
from inc_clusterq.reconstruction.fake_quantize import ActivationQuantizer, BiasCorrection, Mode, WeightQuantizer
from inc_clusterq.reconstruction.graph import Unit, partition, replace_observers
from inc_clusterq.reconstruction.layers import Layer
from inc_clusterq.reconstruction.settings import ReconstructionSettings

Quantizer = ActivationQuantizer | WeightQuantizer
Simulated = Quantizer | BiasCorrection


@dataclass(frozen=True)
class QuantizedGraph:
    """A graph whose quantizers are ours, its smallest units, and the bits of each quantizer."""

    graph_module: fx.GraphModule
    units: tuple[Unit, ...]
    bits: dict[str, int]
    corrections: dict[str, str] = field(default_factory=dict)  # bias -> its correction, attributes of the graph module

    def correction(self, layer: Layer) -> BiasCorrection | None:
        """The layer's bias correction; None where it has none."""
        name = self.corrections.get(layer.bias or "")
        return None if name is None else getattr(self.graph_module, name)


def quantizers(module: nn.Module) -> Iterator[Quantizer]:
    """Each quantizer of a module once, in graph order."""
    for child in module.modules():
        if isinstance(child, (ActivationQuantizer, WeightQuantizer)):
            yield child


def lowest_bits(module: nn.Module, kind: type[Quantizer]) -> int:
    """Of a module's weights or activations; 32 where these stay in float."""
    return min((quantizer.bits for quantizer in quantizers(module) if isinstance(quantizer, kind)), default=32)


def simulated(module: nn.Module) -> Iterator[Simulated]:
    """Each quantizer and each bias correction of a module once, in graph order."""
    for child in module.modules():
        if isinstance(child, (ActivationQuantizer, WeightQuantizer, BiasCorrection)):
            yield child


def set_mode(module: nn.Module, mode: Mode) -> None:
    """Put everything simulated in a module into one mode."""
    for part in simulated(module):
        part.mode = mode


@contextmanager
def in_mode(module: nn.Module, mode: Mode) -> Iterator[None]:
    """Everything simulated in `mode` for the length of a block, then as before."""
    before = [(part, part.mode) for part in simulated(module)]
    set_mode(module, mode)
    try:
        yield
    finally:
        for part, old in before:
            part.mode = old


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
            return ActivationQuantizer(bits[name], settings.range_norm)
        tensor = attribute(graph_module, weights[name].weight)
        return WeightQuantizer(tensor, bits[name], settings.range_norm, settings.learn_weight_scale)

    replace_observers(graph_module, make)
    layers = [layer for unit in units for layer in unit.layers if layer.quantizer]
    corrections = _install_corrections(graph_module, layers) if settings.correct_bias else {}
    return QuantizedGraph(graph_module, tuple(units), bits, corrections)


def _install_corrections(graph_module: fx.GraphModule, layers: list[Layer]) -> dict[str, str]:
    """Put a `BiasCorrection` behind every bias of `layers`.

    A layer that is used twice is corrected once; a bias of layers with different weights would need several corrections,
    and stays as it is.
    """
    nodes = {node.name: node for node in graph_module.graph.nodes}
    weights: dict[str | None, set[str]] = {}
    for layer in layers:
        weights.setdefault(layer.bias, set()).add(layer.weight)
    made: dict[str, str] = {}
    for layer in layers:
        if layer.bias is None or len(weights[layer.bias]) > 1:
            continue
        if layer.bias not in made:
            made[layer.bias] = f"bias_correction_{len(made)}"
            graph_module.add_submodule(made[layer.bias], BiasCorrection(attribute(graph_module, layer.bias).detach()))
        operator = nodes[layer.node]
        weight, bias = operator.args[1], operator.args[2]
        with graph_module.graph.inserting_before(operator):
            corrected = graph_module.graph.call_module(made[layer.bias], (bias, weight))
        corrected.meta.update(bias.meta)
        operator.update_arg(2, corrected)
    graph_module.recompile()
    return made


def write_corrections(quantized: QuantizedGraph) -> None:
    """Work the corrections into the biases and remove them from the graph."""
    graph_module = quantized.graph_module
    graph = graph_module.graph
    for bias, name in quantized.corrections.items():
        calls = [node for node in graph.nodes if node.op == "call_module" and node.target == name]
        with torch.no_grad():
            # A new parameter: the old one may still belong to the user's float model.
            corrected = nn.Parameter(attribute(graph_module, bias) + getattr(graph_module, name).shift, requires_grad=False)
        delattr(graph_module, name)
        replace_attribute(graph_module, bias, corrected, calls)
        for call in calls:
            call.replace_all_uses_with(call.args[0])
            graph.erase_node(call)
    graph_module.recompile()


@torch.no_grad()
def initialise_activations(
    quantized: QuantizedGraph,
    inputs: Tensor,  # shape: (N, *shape)
    batch_size: int,
) -> None:
    """Set every activation's scale and zero point from what the float network does with `inputs`."""
    with in_mode(quantized.graph_module, Mode.OBSERVE):
        for batch in inputs.split(batch_size):
            quantized.graph_module(batch.contiguous())  # the host's graph may ask how its maps lie, by `view`
    for quantizer in quantizers(quantized.graph_module):
        if isinstance(quantizer, ActivationQuantizer):
            quantizer.initialise()
