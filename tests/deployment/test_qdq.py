from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from inc_clusterq.deployment.backend import DEQUANTIZE, QUANTIZE, STORED_MAX
from inc_clusterq.deployment.qdq import convert, write_clamps
from inc_clusterq.reconstruction.bits import BitPlan
from inc_clusterq.reconstruction.checkpoint import UnitStore
from inc_clusterq.reconstruction.fake_quantize import ActivationQuantizer, WeightQuantizer
from inc_clusterq.reconstruction.quantizers import QuantizedGraph, install_quantizers, quantizers
from inc_clusterq.reconstruction.reconstruct import reconstruct
from inc_clusterq.reconstruction.settings import ReconstructionSettings

Network = Callable[[str], tuple[nn.Module, Tensor]]
Reconstructed = Callable[..., QuantizedGraph]

NETWORKS = [
    "chain", "residual", "depthwise", "grouped", "squeeze_excite", "concat", "shuffle", "in_place", "tied", "transposed",
    "averaged", "scaled", "beside", "mirrored",
]  # fmt: skip


def nodes_of(graph_module: fx.GraphModule, target: object) -> list[fx.Node]:
    return [node for node in graph_module.graph.nodes if node.target is target]


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_the_converted_model_is_the_hard_simulation_to_the_bit(
    reconstructed: Reconstructed, network: Network, name: str
) -> None:
    _, inputs = network(name)
    graph = reconstructed(name)
    probes = [inputs, inputs * 10, inputs[:1]]  # the second one far beyond the calibrated ranges
    expected = [graph.graph_module(probe) for probe in probes]
    converted = convert(graph)
    for probe, wanted in zip(probes, expected, strict=True):
        assert torch.equal(converted(probe), wanted)


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@torch.no_grad()
def test_so_it_is_at_every_width(reconstructed: Reconstructed, network: Network, bits: int) -> None:
    _, inputs = network("residual")
    graph = reconstructed("residual", bits, edge=bits, learn_weight_scale=True)
    expected = graph.graph_module(inputs * 3)
    assert torch.equal(convert(graph)(inputs * 3), expected)


@pytest.mark.parametrize("name", ["chain", "grouped", "tied"])
def test_weights_are_stored_as_int8_and_are_the_chosen_integers(reconstructed: Reconstructed, name: str) -> None:
    graph = reconstructed(name)
    chosen = [quantizer for quantizer in quantizers(graph.graph_module) if isinstance(quantizer, WeightQuantizer)]
    integers = [quantizer.integers.to(torch.int8) for quantizer in chosen]
    tensors = [*(converted := convert(graph)).parameters(), *converted.buffers()]
    stored = [tensor for tensor in tensors if tensor.dtype is torch.int8]
    assert len(stored) == len(integers)
    for tensor in integers:
        assert any(torch.equal(tensor, other) for other in stored)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "mirrored"])  # whose originals are read
def test_no_float_original_of_a_quantized_weight_is_left(reconstructed: Reconstructed, name: str) -> None:
    graph = reconstructed(name)
    weights = {layer.shape for unit in graph.units for layer in unit.layers if layer.quantizer is not None}
    left = {layer.shape for unit in graph.units for layer in unit.layers if layer.quantizer is None}
    tensors = convert(graph).state_dict().values()
    assert {tuple(tensor.shape) for tensor in tensors if tensor.is_floating_point()}.isdisjoint(weights - left)


@torch.no_grad()
def test_the_users_float_model_is_untouched(prepare: Callable[[nn.Module, Tensor], fx.GraphModule], network: Network) -> None:
    module, inputs = network("transposed")
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    settings = ReconstructionSettings(iterations=2)
    graph = install_quantizers(prepare(module, inputs), BitPlan(3, 3), settings)
    reconstruct(graph, inputs, settings, seed=0, store=UnitStore())
    convert(graph)
    assert all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items())
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_activations_below_8_bits_are_clamped_in_real_values(reconstructed: Reconstructed) -> None:
    graph = reconstructed("residual")
    found = [quantizer for quantizer in quantizers(graph.graph_module) if isinstance(quantizer, ActivationQuantizer)]
    limits = {quantizer.deployed(): quantizer.top for quantizer in found if quantizer.bits < 8}
    converted = convert(graph)
    clamps = nodes_of(converted, torch.ops.aten.clamp.default)
    assert limits
    assert len(clamps) >= len(limits)
    for clamp in clamps:
        (quantize,) = clamp.users
        scale, zero_point = quantize.args[1:3]
        top = limits[float(scale), int(zero_point)]  # type: ignore[arg-type]
        assert clamp.args[1:] == (-zero_point * scale, (top - zero_point) * scale)  # type: ignore[operator]


def test_every_quantize_node_declares_the_full_range_and_agrees_with_its_dequantize_node(reconstructed: Reconstructed) -> None:
    converted = convert(reconstructed("residual"))
    pairs = nodes_of(converted, QUANTIZE)
    assert pairs
    for node in pairs:
        assert node.args[3:] == (0, STORED_MAX, torch.uint8)
        for user in node.users:
            assert user.target is DEQUANTIZE
            assert user.args[1:] == node.args[1:]


@torch.no_grad()
def test_clamps_leave_the_eager_result_the_same_to_the_bit(
    reconstructed: Reconstructed, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, inputs = network("residual")
    with monkeypatch.context() as patch:
        patch.setattr("inc_clusterq.deployment.qdq.write_clamps", lambda graph_module: 0)
        converted = convert(reconstructed("residual"))
    assert nodes_of(converted, torch.ops.aten.clamp.default) == []
    probes = [inputs * factor for factor in (0.1, 1, 10, 1000)]
    before = [converted(probe) for probe in probes]
    assert write_clamps(converted) > 0
    assert all(torch.equal(converted(probe), wanted) for probe, wanted in zip(probes, before, strict=True))
    assert write_clamps(converted) == 0  # once is enough


def test_8_bits_need_no_clamps(reconstructed: Reconstructed) -> None:
    assert nodes_of(convert(reconstructed("residual", bits=8)), torch.ops.aten.clamp.default) == []
