from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from inc_clusterq.reconstruction import moments
from inc_clusterq.reconstruction.fake_quantize import Mode
from inc_clusterq.reconstruction.graph import Layer, attribute, extract, partition
from inc_clusterq.reconstruction.moments import collect, columns
from inc_clusterq.reconstruction.quantizers import QuantizedGraph, in_mode, initialise_activations

Network = Callable[[str], tuple[nn.Module, Tensor]]
Prepare = Callable[[nn.Module, Tensor], fx.GraphModule]
Quantized = Callable[..., QuantizedGraph]


def assert_columns_are_what_the_operator_multiplies(graph_module: fx.GraphModule, layer: Layer, x: Tensor) -> None:
    operator = next(node for node in graph_module.graph.nodes if node.name == layer.node)
    weight = attribute(graph_module, layer.weight)
    expected = operator.target(x, weight, None, *operator.args[3:])
    found = columns(x, layer, operator)
    product = weight.reshape(layer.groups, -1, found.shape[1]) @ found
    shape = (x.shape[0], *expected.shape[2:]) if layer.kind != "linear" else (x.shape[0],)
    torch.testing.assert_close(product.reshape(-1, *shape).transpose(0, 1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["chain", "depthwise", "grouped", "squeeze_excite", "concat"])
@torch.no_grad()
def test_columns_are_what_the_operator_multiplies(quantized: Quantized, network: Network, name: str) -> None:
    x = network(name)[1][:4]
    graph = quantized(name)
    for unit in graph.units:
        for layer in unit.layers:
            seen = extract(graph.graph_module, unit, input_of=layer.node)(x)
            assert_columns_are_what_the_operator_multiplies(graph.graph_module, layer, seen)
        x = extract(graph.graph_module, unit)(x)


@torch.no_grad()
def test_columns_know_dilation_padding_and_one_dimension(prepare: Prepare) -> None:
    plane = nn.Sequential(nn.Conv2d(3, 4, (3, 1), (1, 2), (2, 0), (2, 1)), nn.Conv2d(4, 4, 1, padding=1))
    line = nn.Sequential(nn.Conv1d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv1d(4, 6, 2, dilation=2, groups=2))
    for module, x in ((plane, torch.randn(2, 3, 9, 8)), (line, torch.randn(2, 3, 17))):
        graph_module = prepare(module.eval(), x)
        for layer in [layer for unit in partition(graph_module) for layer in unit.layers]:
            assert_columns_are_what_the_operator_multiplies(graph_module, layer, x)
            x = attribute(module, layer.name)(x)


@pytest.mark.parametrize("at_once", [1, 2**24])
@torch.no_grad()
def test_moments_are_those_of_all_images_together(
    quantized: Quantized, network: Network, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(moments, "VALUES_AT_ONCE", at_once)
    _, inputs = network("residual")
    graph = quantized("residual")
    initialise_activations(graph, inputs, 8)
    stem, unit = graph.units[0], graph.units[1]
    layer = unit.layers[1]
    with in_mode(graph.graph_module, Mode.FLOAT):
        x = extract(graph.graph_module, stem)(inputs)
        expected_x = functional.unfold(extract(graph.graph_module, unit, input_of=layer.node)(x), 3, padding=1)
    with in_mode(graph.graph_module, Mode.HARD):
        quantized_x = extract(graph.graph_module, stem)(inputs)
        expected = functional.unfold(extract(graph.graph_module, unit, input_of=layer.node)(quantized_x), 3, padding=1)
    found = collect(graph.graph_module, unit, layer, x, quantized_x, batch_size=5)
    a, b = (tensor.double().transpose(0, 1).flatten(1) for tensor in (expected_x, expected))
    both = torch.cov(torch.cat([b, a]), correction=0)
    n = len(a)
    assert found.samples == a.shape[1]
    torch.testing.assert_close(found.mean[0], b.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.float_mean[0], a.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.covariance[0], both[:n, :n], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.cross[0], both[:n, n:], rtol=1e-4, atol=1e-5)
