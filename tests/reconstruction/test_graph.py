from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from odd_networks import Normed
from torch import Tensor, fx, nn

from inc_clusterq.nodes import is_observer
from inc_clusterq.reconstruction.cleanup import erase_guards, functionalise, localise_batch_sizes
from inc_clusterq.reconstruction.fake_quantize import Mode
from inc_clusterq.reconstruction.graph import Unit, extract, join, partition, replace_observers
from inc_clusterq.reconstruction.layers import WEIGHTED
from inc_clusterq.reconstruction.quantizers import QuantizedGraph, in_mode, initialise_activations

Network = Callable[[str], tuple[nn.Module, Tensor]]
Prepare = Callable[[nn.Module, Tensor], fx.GraphModule]
Prepared = Callable[[str], fx.GraphModule]
Quantized = Callable[..., QuantizedGraph]

UNITS = {  # layers of each unit, by hand
    "chain": ["stem.0", "a.0", "b.0", "c.0", "fc"],
    "residual": ["stem.0", "one.conv1.0 one.conv2.0", "two.conv1.0 two.conv2.0", "fc"],
    "depthwise": ["stem.0", "dw1.0", "pw1.0", "dw2.0", "pw2.0", "fc"],
    "grouped": ["stem.0", "reduce.0 grouped.0 expand.0 shortcut.0", "fc"],
    "squeeze_excite": ["stem.0", "a.0", "down up", "b.0", "fc"],
    "concat": ["stem.0", "s1.0", "e1.0 e3.0", "s2.0", "f1.0 f3.0", "fc"],
    "shuffle": ["stem.0", "a.0", "b.0", "fc"],
    "in_place": ["stem.0", "a.0", "b.0", "fc"],
    "tied": ["stem.0", "a", "a", "fc"],
    "transposed": ["stem.0", "a.0", "up", "fc"],
    "worded": ["stem.0", "a", "b", "c", "fc"],
    "signal": ["stem", "a b down up", "c d", "fc"],
}


def run(units: tuple[Unit, ...], graph_module: fx.GraphModule, x: Tensor) -> Tensor:
    """All units one after the other."""
    for unit in units:
        x = extract(graph_module, unit)(x)
    return x


def reaches_output_without(graph_module: fx.GraphModule, removed: str) -> bool:
    """Whether something else than the node `removed` still leads from the input to the output."""
    reached = {node.name for node in graph_module.graph.nodes if node.op == "placeholder"}
    for node in graph_module.graph.nodes:
        if node.name != removed and any(argument.name in reached for argument in node.all_input_nodes):
            reached.add(node.name)
    return "output" in reached


def test_a_unit_ends_behind_limits_and_norms(prepare: Prepare) -> None:
    graph_module = prepare(Normed().eval(), torch.rand(8, 3, 8, 8))
    operators = {node.name: str(node.target) for node in graph_module.graph.nodes}
    ends = {unit.name: operators[unit.end].split(".")[1] for unit in partition(graph_module)}
    assert ends == {"one": "clamp", "up": "relu", "two": "relu", "last": "linear"}


@pytest.mark.parametrize("name", UNITS)
def test_units_are_the_structures_that_one_tensor_leaves(quantized: Quantized, name: str) -> None:
    units = quantized(name).units
    assert [" ".join(layer.name for layer in unit.layers) for unit in units] == UNITS[name]


@pytest.mark.parametrize("name", UNITS)
@torch.no_grad()
def test_the_units_in_a_row_are_the_float_model(quantized: Quantized, network: Network, name: str) -> None:
    module, inputs = network(name)
    graph = quantized(name)
    # Folding BatchNorm rounds differently.
    torch.testing.assert_close(run(graph.units, graph.graph_module, inputs), module(inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", UNITS)
@torch.no_grad()
def test_the_units_in_a_row_are_the_quantized_graph(quantized: Quantized, network: Network, name: str) -> None:
    _, inputs = network(name)
    graph = quantized(name)
    initialise_activations(graph, inputs, 8)
    with in_mode(graph.graph_module, Mode.HARD):
        assert torch.equal(run(graph.units, graph.graph_module, inputs), graph.graph_module(inputs))


@pytest.mark.parametrize("name", UNITS)
def test_every_weighted_operator_lies_in_exactly_one_unit(quantized: Quantized, name: str) -> None:
    graph = quantized(name)
    operators = [node.name for node in graph.graph_module.graph.nodes if node.target in WEIGHTED]
    assert [layer.node for unit in graph.units for layer in unit.layers] == operators
    nodes = [node for unit in graph.units for node in unit.nodes]
    assert len(nodes) == len(set(nodes))
    assert all(set(layer.node for layer in unit.layers) <= set(unit.nodes) for unit in graph.units)


@pytest.mark.parametrize("name", UNITS)
def test_nothing_passes_by_a_cut(quantized: Quantized, name: str) -> None:
    graph = quantized(name)
    for unit, following in pairwise(graph.units):
        assert unit.end == following.start
        assert not reaches_output_without(graph.graph_module, unit.end)


@pytest.mark.parametrize("name", UNITS)
def test_layers_have_the_names_that_the_user_gave(quantized: Quantized, network: Network, name: str) -> None:
    module, _ = network(name)
    written = {
        path for path, part in module.named_modules() if isinstance(part, (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear))
    }
    assert {layer.name for unit in quantized(name).units for layer in unit.layers} == written


def test_a_cut_falls_behind_the_activation_function_and_before_the_quantizer(quantized: Quantized) -> None:
    graph = quantized("residual")
    nodes = {node.name: node for node in graph.graph_module.graph.nodes}
    ends = [nodes[unit.end] for unit in graph.units[:-1]]
    assert {node.target for node in ends} == {torch.ops.aten.relu.default}
    assert all(any(is_observer(user) for user in node.users) for node in ends[:2])
    # The padded shortcut of the second block reads the tensor that is not quantized.
    assert any(not is_observer(user) for user in ends[1].users)


def test_layers_know_their_kind_stride_and_size(quantized: Quantized) -> None:
    layers = {layer.name: layer for unit in quantized("depthwise").units for layer in unit.layers}
    found = {name: (layer.kind, layer.stride, layer.dilation, layer.parameters) for name, layer in layers.items()}
    assert found == {
        "stem.0": ("dense", 1, 1, 8 * 3 * 9),
        "dw1.0": ("depthwise", 1, 1, 8 * 9),
        "pw1.0": ("dense", 1, 1, 64),
        "dw2.0": ("depthwise", 2, 1, 8 * 9),
        "pw2.0": ("dense", 1, 1, 128),
        "fc": ("linear", 1, 1, 80),
    }
    grouped = [layer for unit in quantized("grouped").units for layer in unit.layers if layer.name == "grouped.0"]
    assert grouped[0].kind == "grouped"


def test_the_path_is_the_longest_chain_through_a_unit(quantized: Quantized) -> None:
    assert quantized("grouped").units[1].path == ("reduce.0", "grouped.0", "expand.0")


def test_a_dilated_convolution_is_known(prepare: Prepare) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3, dilation=(2, 1)), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.LazyLinear(2))
    inputs = torch.randn(2, 3, 8, 8)
    module(inputs)
    assert partition(prepare(module, inputs))[0].layers[0].dilation == 2


def test_a_weight_that_the_host_leaves_in_float_has_no_quantizer(quantized: Quantized) -> None:
    graph = quantized("transposed")
    assert [layer.quantizer is None for unit in graph.units for layer in unit.layers] == [False, False, True, False]


def test_joined_units_run_as_their_parts(quantized: Quantized, network: Network) -> None:
    _, inputs = network("residual")
    graph = quantized("residual")
    first, second = graph.units[1:3]
    joined = join([first, second])
    assert joined.layers == first.layers + second.layers
    x = extract(graph.graph_module, graph.units[0])(inputs)
    parts = extract(graph.graph_module, second)(extract(graph.graph_module, first)(x))
    assert torch.equal(extract(graph.graph_module, joined)(x), parts)


def test_an_extracted_unit_shares_weights_and_quantizers(quantized: Quantized) -> None:
    graph = quantized("chain")
    module = extract(graph.graph_module, graph.units[1])
    owned = {id(tensor) for tensor in [*graph.graph_module.parameters(), *graph.graph_module.buffers()]}
    assert all(id(tensor) in owned for tensor in [*module.parameters(), *module.buffers()])


def test_quantizers_that_the_host_shares_stay_shared(prepared: Prepared) -> None:
    graph_module = prepared("concat")
    names = [str(node.target) for node in graph_module.graph.nodes if is_observer(node)]
    before = [id(getattr(graph_module, name)) for name in names]
    assert len(set(before)) < len(set(names))  # the concatenations' inputs and outputs
    replace_observers(graph_module, lambda name: nn.Identity())
    after = [id(getattr(graph_module, name)) for name in names]
    assert [before.index(one) for one in before] == [after.index(one) for one in after]


def test_no_operator_overwrites_its_input_afterwards(prepared: Prepared, network: Network) -> None:
    module, inputs = network("in_place")
    graph_module = prepared("in_place")

    def overwriting() -> list[str]:
        return [
            node.name
            for node in graph_module.graph.nodes
            if getattr(getattr(node.target, "_schema", None), "is_mutable", False)
        ]

    assert len(overwriting()) == 4
    erase_guards(graph_module)
    functionalise(graph_module)
    assert overwriting() == []
    torch.testing.assert_close(graph_module(inputs), module(inputs), rtol=1e-4, atol=1e-5)


def test_readers_of_an_overwritten_tensor_read_what_was_written() -> None:
    class Careless(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x + 1
            before = y * 3
            y.relu_()  # the result is not used, the tensor is
            return y - before

    x = torch.randn(2, 3)
    graph_module = torch.export.export(Careless(), (x,)).module()
    assert isinstance(graph_module, fx.GraphModule)
    functionalise(graph_module)
    torch.testing.assert_close(graph_module(x), Careless()(x))


def test_a_batch_size_is_read_where_it_is_used(prepared: Prepared, network: Network) -> None:
    module, inputs = network("shuffle")
    graph_module = prepared("shuffle")
    erase_guards(graph_module)
    localise_batch_sizes(graph_module)
    sizes = [node for node in graph_module.graph.nodes if node.target is torch.ops.aten.sym_size.int]
    assert all(node.args[0].op != "placeholder" for node in sizes)
    for count in (1, 5, 24):
        torch.testing.assert_close(graph_module(inputs[:count]), module(inputs[:count]), rtol=1e-4, atol=1e-5)


def test_a_model_without_weights_has_no_units(prepare: Prepare) -> None:
    assert partition(prepare(nn.Sequential(nn.ReLU(), nn.Flatten()), torch.randn(2, 3, 8, 8))) == []
