"""Bit-exact hand-over of a reconstructed graph into the quantize-dequantize form that the x86 back ends take.

Scales and zero points pass through observers that return them as they are; weights are written back as the float tensors
that quantize to exactly the chosen integers, biases with their corrections. `convert_pt2e` then folds the weights to int8.

Two things the back ends do not do by themselves:
  * A fused requantization saturates at 255, whatever `quant_max` says. Below 8 bits the upper clamp is therefore written
    into the graph in front of the quantize node, in real values, and the node gets its full range. The eager result is the
    same to the bit.
  * The float originals of folded weights stay in the module, and the saved file would carry both. They are dropped.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torchao.quantization.pt2e import ObserverBase
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

from inc_clusterq.attributes import replace_attribute
from inc_clusterq.deployment.backend import DEQUANTIZE, QUANTIZE, STORED_MAX
from inc_clusterq.deployment.shapes import record_shapes
from inc_clusterq.reconstruction.fake_quantize import ActivationQuantizer, WeightQuantizer
from inc_clusterq.reconstruction.graph import replace_observers
from inc_clusterq.reconstruction.quantizers import QuantizedGraph, write_corrections
from inc_clusterq.reconstruction.ranges import signed_levels

aten = torch.ops.aten
SOURCE_NOTES = ("stack_trace", "from_node", "source_fn_stack", "torch_fn")  # of a node's metadata


class FixedObserver(ObserverBase):  # type: ignore[misc]  # torchao ships no types
    """Hands over a known scale and zero point."""

    def __init__(self, scale: Tensor, zero_point: Tensor, dtype: torch.dtype, lowest: int, highest: int) -> None:
        super().__init__(dtype=dtype)
        self.scale, self.zero_point = scale, zero_point
        self.quant_min, self.quant_max = lowest, highest
        per_channel = scale.numel() > 1 or dtype is torch.int8
        self.qscheme = torch.per_channel_symmetric if per_channel else torch.per_tensor_affine
        self.ch_axis = 0
        self.eps = torch.finfo(torch.float32).eps

    def forward(self, x: Tensor) -> Tensor:
        return x

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        """The scale and zero point as they were given."""
        return self.scale, self.zero_point


def convert(quantized: QuantizedGraph) -> fx.GraphModule:
    """The deployable graph; `quantized` is used up.

    Weights come out as int8 constants, activations as uint8 quantize-dequantize pairs with explicit clamps below 8 bits.
    """
    graph_module = quantized.graph_module
    write_weights(quantized)
    write_corrections(quantized)
    replace_observers(graph_module, lambda name: _fixed(getattr(graph_module, name)))
    with without_training_patterns():
        converted: fx.GraphModule = convert_pt2e(graph_module, fold_quantize=True)
    write_clamps(converted)
    drop_unused_tensors(converted)
    forget_sources(converted)
    record_shapes(converted)
    return converted


def write_weights(quantized: QuantizedGraph) -> None:
    """Put the weights that quantize to the chosen integers in the place of the float ones, where these are quantized."""
    graph_module = quantized.graph_module
    layers = [layer for unit in quantized.units for layer in unit.layers]
    for weight, name in {layer.weight: layer.quantizer for layer in layers if layer.quantizer is not None}.items():
        quantizer = getattr(graph_module, name)
        calls = [node for node in graph_module.graph.nodes if node.op == "call_module"]
        readers = [call for call in calls if getattr(graph_module, str(call.target)) is quantizer]
        # A new parameter: the old one may still belong to the user's float model.
        replace_attribute(graph_module, weight, nn.Parameter(quantizer.deployed(), requires_grad=False), readers)
    graph_module.recompile()


@contextmanager
def without_training_patterns() -> Iterator[None]:
    """Spare `convert_pt2e` its search for convolutions that were quantized while they were trained.

    Wherever a BatchNorm is left it exports dozens of patterns for that, which takes 20 seconds, and none of ours is in them.
    """
    with patch("torchao.quantization.pt2e.quantize_pt2e._fold_conv_bn_qat", lambda graph_module: graph_module, create=True):
        yield


def write_clamps(graph_module: fx.GraphModule) -> int:
    """Make the upper clamp of every activation below 8 bits explicit; returns how many there were."""
    count = 0
    for node in list(graph_module.graph.nodes):
        if node.target is not QUANTIZE or node.args[5] is not torch.uint8 or node.args[4] == STORED_MAX:
            continue
        x, scale, zero_point, lowest, highest, dtype = node.args
        with graph_module.graph.inserting_before(node):
            limits = ((lowest - zero_point) * scale, (highest - zero_point) * scale)
            clamp = graph_module.graph.call_function(aten.clamp.default, (x, *limits))
        clamp.meta.update(x.meta)
        node.args = (clamp, scale, zero_point, 0, STORED_MAX, dtype)
        for user in list(node.users):
            if user.target is DEQUANTIZE:
                user.args = (node, scale, zero_point, 0, STORED_MAX, dtype)
        count += 1
    graph_module.recompile()
    return count


def drop_unused_tensors(graph_module: fx.GraphModule) -> None:
    """Remove parameters and buffers that no node reads, and submodules that are then empty."""
    used = {str(node.target) for node in graph_module.graph.nodes if node.op in ("get_attr", "call_module")}
    names = [name for name, _ in [*graph_module.named_parameters(), *graph_module.named_buffers()]]
    for name in names:
        if name not in used:
            owner, _, leaf = name.rpartition(".")
            delattr(graph_module.get_submodule(owner), leaf)
    owners = {name.partition(".")[0] for name in used}
    for name, _ in list(graph_module.named_children()):
        if name not in owners:
            delattr(graph_module, name)


def archived(program: ExportedProgram) -> bytes:
    """The file of a program; made in memory, since on a full disk torch's writer ends the whole process."""
    archive = io.BytesIO()
    torch.export.save(program, archive)
    return archive.getvalue()


def forget_sources(graph_module: fx.GraphModule) -> None:
    """Remove stack traces: they quote the user's source files, and make up most of a small model's file."""
    for node in graph_module.graph.nodes:
        for key in SOURCE_NOTES:
            node.meta.pop(key, None)


def _fixed(quantizer: nn.Module) -> FixedObserver:
    if isinstance(quantizer, WeightQuantizer):
        scale = quantizer.start_scale.detach().flatten().cpu()
        return FixedObserver(scale, torch.zeros_like(scale, dtype=torch.int64), torch.int8, *signed_levels(quantizer.bits))
    assert isinstance(quantizer, ActivationQuantizer)
    scale_value, zero_point = quantizer.deployed()
    return FixedObserver(torch.tensor([scale_value]), torch.tensor([zero_point]), torch.uint8, 0, quantizer.top)
