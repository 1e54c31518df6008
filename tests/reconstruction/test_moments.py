from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from inc_clusterq.attributes import attribute
from inc_clusterq.reconstruction import moments
from inc_clusterq.reconstruction.fake_quantize import Mode
from inc_clusterq.reconstruction.graph import extract, partition
from inc_clusterq.reconstruction.layers import Layer
from inc_clusterq.reconstruction.moments import collect, collect_outputs, columns, input_pairs, outputs_of
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
def test_columns_know_dilation_padding_and_height_1(prepare: Prepare) -> None:
    plane = nn.Sequential(nn.Conv2d(3, 4, (3, 1), (1, 2), (2, 0), (2, 1)), nn.Conv2d(4, 4, 1, padding=1))
    line = nn.Sequential(nn.Conv1d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv1d(4, 6, 2, dilation=2, groups=2))
    for module, x in ((plane, torch.randn(2, 3, 9, 8)), (line, torch.randn(2, 3, 17))):
        graph_module = prepare(module.eval(), x)
        for layer in [layer for unit in partition(graph_module) for layer in unit.layers]:
            image = x if module is plane else x.unsqueeze(2)  # networks on signals are prepared as networks on images
            assert_columns_are_what_the_operator_multiplies(graph_module, layer, image)
            x = attribute(module, layer.name)(x)


@pytest.mark.parametrize(
    "convolution",
    [nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(2, 4, 3, 2, 1, groups=2), nn.Conv2d(2, 4, 1), nn.Conv2d(2, 4, (1, 3), (1, 2))],
    ids=["same", "strided", "pointwise", "flat"],
)
@torch.no_grad()
def test_over_many_images_each_position_of_a_large_map_is_taken_equally_often(prepare: Prepare, convolution: nn.Conv2d) -> None:
    """The images are the same, so that only positions differ; nine of them go through all places of a grid of three."""
    one = torch.randn(1, 2, 11, 10)
    x = one.expand(9, -1, -1, -1)
    graph_module = prepare(convolution.eval(), x)
    (layer,) = (layer for unit in partition(graph_module) for layer in unit.layers)
    operator = next(node for node in graph_module.graph.nodes if node.name == layer.node)
    whole = columns(one, layer, operator)
    wanted = whole.shape[-1] // 9
    together = columns(x, layer, operator, wanted)
    apart = [columns(part, layer, operator, wanted, seen) for part, seen in zip(x.split(2), (0, 2, 4, 6, 8), strict=True)]
    for found in (together, torch.cat(apart, -1)):
        assert found.shape == whole.shape
        for group in range(len(whole)):
            assert sorted(map(tuple, found[group].T.tolist())) == sorted(map(tuple, whole[group].T.tolist()))


def test_few_images_give_all_their_positions(quantized: Quantized, network: Network) -> None:
    _, inputs = network("residual")
    graph = quantized("residual")
    stem = graph.units[0]
    positions = inputs.shape[2] * inputs.shape[3]
    assert positions <= moments.POSITIONS
    assert collect(input_pairs(graph.graph_module, stem, stem.layers[0], inputs, inputs, 8)).samples == len(inputs) * positions


@torch.no_grad()
def test_positions_are_left_out_where_the_columns_are_more_than_enough(
    quantized: Quantized, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, inputs = network("residual")
    graph = quantized("residual")
    stem = graph.units[0]
    row = stem.layers[0].parameters // stem.layers[0].shape[0]
    monkeypatch.setattr(moments, "POSITIONS", 1)
    monkeypatch.setattr(moments, "COLUMNS", 2)
    fewer = collect(input_pairs(graph.graph_module, stem, stem.layers[0], inputs, inputs, 8)).samples
    assert 2 * row <= fewer < len(inputs) * inputs.shape[2] * inputs.shape[3]


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
    found = collect(input_pairs(graph.graph_module, unit, layer, x, quantized_x, batch_size=5))
    a, b = (tensor.double().transpose(0, 1).flatten(1) for tensor in (expected_x, expected))
    both = torch.cov(torch.cat([b, a]), correction=0)
    n = len(a)
    assert found.samples == a.shape[1]
    torch.testing.assert_close(found.mean[0], b.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.float_mean[0], a.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.covariance[0], both[:n, :n], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.cross[0], both[:n, n:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["chain", "grouped"])
@torch.no_grad()
def test_what_a_bias_needs_is_the_same_without_a_square_matrix(quantized: Quantized, network: Network, name: str) -> None:
    graph, x = quantized(name), network(name)[1]
    initialise_activations(graph, x, len(x))
    for unit in graph.units:
        module = extract(graph.graph_module, unit)
        with in_mode(module, Mode.FLOAT):
            following = module(x)
        for layer in unit.layers:
            seen = (graph.graph_module, unit, layer, x, x * 0.9, 10)
            moments = collect(input_pairs(*seen))
            rows = attribute(graph.graph_module, layer.weight).reshape(layer.groups, -1, moments.mean.shape[-1])
            expected, found = outputs_of(rows.double(), moments), collect_outputs(rows, input_pairs(*seen))
            for one, other in zip(astuple(found), astuple(expected), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        x = following
