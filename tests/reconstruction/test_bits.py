from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from odd_networks import Twin
from torch import Tensor, fx, nn

from inc_clusterq.nodes import is_observer
from inc_clusterq.reconstruction.bits import BitPlan, LayerBits, assign_bits
from inc_clusterq.reconstruction.graph import extract, partition
from inc_clusterq.reconstruction.quantizers import install_quantizers, quantizers
from inc_clusterq.reconstruction.settings import ReconstructionSettings

Prepare = Callable[[nn.Module, Tensor], fx.GraphModule]
Prepared = Callable[[str], fx.GraphModule]
Bits = tuple[dict[str, int], dict[str, int]]


def bits_of(graph_module: fx.GraphModule, plan: BitPlan) -> Bits:
    """By layer name: bits of the weight, and of the tensor that the operator reads."""
    units = partition(graph_module)
    bits = assign_bits(graph_module, units, plan)
    nodes = {node.name: node for node in graph_module.graph.nodes}
    weights, inputs = {}, {}
    for unit in units:
        for layer in unit.layers:
            if layer.quantizer is not None:
                weights[layer.name] = bits[layer.quantizer]
                inputs[layer.name] = bits[str(nodes[layer.node].args[0].target)]
    return weights, inputs


def test_the_first_and_the_last_layer_keep_8_bits_in_weights_and_inputs(prepared: Prepared) -> None:
    weights, inputs = bits_of(prepared("chain"), BitPlan(2, 3))
    assert weights == {"stem.0": 8, "a.0": 2, "b.0": 2, "c.0": 2, "fc": 8}
    assert inputs == {"stem.0": 8, "a.0": 3, "b.0": 3, "c.0": 3, "fc": 8}


def test_edges_get_the_bits_that_are_asked_for_but_not_fewer_than_the_rest(prepared: Prepared) -> None:
    weights, inputs = bits_of(prepared("chain"), BitPlan(4, 6, edge=5))
    assert weights == {"stem.0": 5, "a.0": 4, "b.0": 4, "c.0": 4, "fc": 5}
    assert inputs == {"stem.0": 6, "a.0": 6, "b.0": 6, "c.0": 6, "fc": 6}


def test_a_shortcut_is_not_an_edge(prepared: Prepared) -> None:
    weights, _ = bits_of(prepared("grouped"), BitPlan(4, 4))
    assert weights == {"stem.0": 8, "reduce.0": 4, "grouped.0": 4, "expand.0": 4, "shortcut.0": 4, "fc": 8}


def test_a_layer_named_in_the_plan_gets_its_own_bits(prepared: Prepared) -> None:
    plan = BitPlan(4, 4, layers={"b.0": LayerBits(weight=2), "c.0": LayerBits(6, 7), "fc": LayerBits(3, 5)})
    weights, inputs = bits_of(prepared("chain"), plan)
    assert weights == {"stem.0": 8, "a.0": 4, "b.0": 2, "c.0": 6, "fc": 3}
    assert inputs == {"stem.0": 8, "a.0": 4, "b.0": 4, "c.0": 7, "fc": 5}


def test_layers_of_a_kind_get_its_bits_and_a_name_is_stronger(prepared: Prepared) -> None:
    kinds = {"depthwise": LayerBits(8, 6), "linear": LayerBits(weight=3)}
    plan = BitPlan(4, 4, layers={"dw2.0": LayerBits(activation=5), "pw1.0": LayerBits(weight=2)}, kinds=kinds)
    weights, inputs = bits_of(prepared("depthwise"), plan)
    assert weights == {"stem.0": 8, "dw1.0": 8, "pw1.0": 2, "dw2.0": 8, "pw2.0": 4, "fc": 3}
    assert inputs == {"stem.0": 8, "dw1.0": 6, "pw1.0": 4, "dw2.0": 5, "pw2.0": 4, "fc": 8}


def test_of_two_layers_that_read_one_tensor_the_finer_request_counts(prepared: Prepared) -> None:
    plan = BitPlan(4, 4, layers={"reduce.0": LayerBits(activation=5), "shortcut.0": LayerBits(activation=7)})
    _, inputs = bits_of(prepared("grouped"), plan)
    assert inputs["reduce.0"] == inputs["shortcut.0"] == 7


def test_a_layer_whose_input_another_one_lowers_is_named(prepared: Prepared, caplog: pytest.LogCaptureFixture) -> None:
    plan = BitPlan(8, 8, layers={"reduce.0": LayerBits(activation=3)})
    _, inputs = bits_of(prepared("grouped"), plan)
    assert inputs["shortcut.0"] == 3
    assert "gives the input of reduce.0 3 bits, and shortcut.0 reads the same" in caplog.text


@pytest.mark.parametrize(
    ("names", "message"),
    [(("a.0", "b.1", "head"), r"b\.1, head; did you mean b\.0"), (("head",), r"head; it has: stem\.0, a\.0, b\.0, c\.0, fc")],
)
def test_an_unknown_layer_is_an_error_that_names_the_nearest_or_all(
    prepared: Prepared, names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        bits_of(prepared("chain"), BitPlan(4, 4, layers=dict.fromkeys(names, LayerBits(8))))


@pytest.mark.parametrize("layers", [{}, {"s2.0": LayerBits(activation=7)}, {"f1.0": LayerBits(activation=2)}])
def test_quantizers_that_the_host_shares_have_one_width(prepared: Prepared, layers: dict[str, LayerBits]) -> None:
    graph_module = prepared("concat")
    bits = assign_bits(graph_module, partition(graph_module), BitPlan(4, 4, layers=layers))
    widths: dict[int, set[int]] = {}
    for node in graph_module.graph.nodes:
        if is_observer(node):
            widths.setdefault(id(getattr(graph_module, str(node.target))), set()).add(bits[str(node.target)])
    assert all(len(width) == 1 for width in widths.values())


@pytest.mark.parametrize(
    "name", ["residual", "depthwise", "squeeze_excite", "concat", "shuffle", "in_place", "tied", "transposed", "signal"]
)
def test_every_quantizer_has_bits(prepared: Prepared, name: str) -> None:
    graph_module = prepared(name)
    bits = assign_bits(graph_module, partition(graph_module), BitPlan(4, 4))
    assert set(bits) == {str(node.target) for node in graph_module.graph.nodes if is_observer(node)}
    assert set(bits.values()) <= {4, 8}


@pytest.mark.parametrize("asked", ["three", "four"])
def test_a_weight_that_two_layers_share_has_the_bits_of_the_finer_request(prepare: Prepare, asked: str) -> None:
    graph_module = prepare(Twin().eval(), torch.rand(8, 3, 8, 8))
    assert bits_of(graph_module, BitPlan(4, 4))[0] == {"one": 8, "three": 4, "four": 4, "two": 4, "last": 8}
    weights, _ = bits_of(graph_module, BitPlan(4, 4, layers={asked: LayerBits(weight=6)}))
    assert (weights["three"], weights["four"]) == (6, 6)


def test_a_layer_that_stays_in_float_has_no_bits(prepared: Prepared) -> None:
    with pytest.raises(ValueError, match="names up, which the host's quantizer leaves in float"):
        bits_of(prepared("transposed"), BitPlan(4, 4, layers={"up": LayerBits(8)}))


def test_bits_for_a_kind_that_the_model_does_not_have_are_told(prepared: Prepared, caplog: pytest.LogCaptureFixture) -> None:
    bits_of(prepared("chain"), BitPlan(4, 4, kinds={"depthwise": LayerBits(8), "dense": LayerBits(5)}))
    assert [record.message for record in caplog.records] == ["bits are given for depthwise layers, and the model has none"]


@pytest.mark.parametrize("name", ["chain", "residual", "grouped", "squeeze_excite", "concat", "shuffle", "attentive", "pooled"])
def test_everything_in_a_raised_unit_has_8_bits(prepared: Prepared, name: str) -> None:
    """What a shortcut's convolution adds to the sum is read by nothing in the unit but the sum."""
    low = BitPlan(2, 2, edge=2)
    for unit in install_quantizers(prepared(name), low, ReconstructionSettings()).units:
        raised = replace(low, raised=frozenset(layer.name for layer in unit.layers))
        graph_module = install_quantizers(prepared(name), raised, ReconstructionSettings()).graph_module
        assert {quantizer.bits for quantizer in quantizers(extract(graph_module, unit))} == {8}
        assert 2 in {quantizer.bits for quantizer in quantizers(graph_module)}


def test_a_raised_unit_has_8_bits_whatever_was_asked_for_its_layers(prepared: Prepared) -> None:
    asked = {"a.0": LayerBits(3, 3), "b.0": LayerBits(3, 3)}
    weights, inputs = bits_of(prepared("chain"), BitPlan(4, 4, layers=asked, raised=frozenset({"b.0"})))
    assert (weights["a.0"], weights["b.0"], weights["c.0"]) == (3, 8, 4)
    assert (inputs["a.0"], inputs["b.0"]) == (3, 8)
