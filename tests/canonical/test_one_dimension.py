from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from inc_clusterq.canonical.one_dimension import lift_to_two_dimensions

Export = Callable[[nn.Module, Tensor], fx.GraphModule]
Network = Callable[[str], tuple[nn.Module, Tensor]]
aten = torch.ops.aten


class Between(nn.Module):
    """Two convolutions, and `function` between them."""

    def __init__(self, function: Callable[[Tensor], Tensor], channels: int = 8) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(3, 8, 3, padding=1), nn.Conv1d(channels, 4, 1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.function(self.first(x)))
        return result


def operators(graph_module: fx.GraphModule) -> list[object]:
    return [node.target for node in graph_module.graph.nodes if node.op == "call_function"]


def lift_between(export: Export, function: Callable[[Tensor], Tensor]) -> list[object]:
    """Lift a network with `function` between two convolutions; its operators, after a comparison with the network."""
    module = Between(function)
    inputs = torch.randn(6, 3, 17, generator=torch.Generator().manual_seed(0))
    exported = export(module, inputs)
    assert lift_to_two_dimensions(exported) == 2
    with torch.no_grad():
        torch.testing.assert_close(exported(inputs), module(inputs))
        torch.testing.assert_close(exported(inputs[:1]), module(inputs[:1]))  # the batch dimension is still free
    return operators(exported)


LIFTED: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "hardswish": functional.hardswish,
    "gelu": lambda x: functional.gelu(x, approximate="tanh"),
    "weighted_sum": lambda x: torch.add(x, x, alpha=3),
    "one_factor": lambda x: x * torch.tensor(0.3),
    "group_norm": lambda x: functional.group_norm(x, 2, torch.linspace(0, 1, 8)),
    "instance_norm": lambda x: functional.instance_norm(x),
    "leaky_relu": lambda x: functional.leaky_relu(x, 0.2),
    "prelu": lambda x: functional.prelu(x, torch.linspace(0, 1, 8)),
    "scaled": lambda x: 2 * x + 1,
    "gate": lambda x: x * torch.sigmoid(x.mean(-1, keepdim=True)),
    "learned_shift": lambda x: x + torch.linspace(0, 1, 8).view(1, 8, 1),
    "in_place": lambda x: x.relu_() + x,
    "max_pool": lambda x: functional.max_pool1d(x, 3, 2, 1, 1, ceil_mode=True),
    "max_pool_alone": lambda x: functional.max_pool1d(x, 3),
    "avg_pool": lambda x: functional.avg_pool1d(x, 3, 2, 1, count_include_pad=False),
    "adaptive": lambda x: functional.adaptive_avg_pool1d(x, 5),
    "every_other": lambda x: x[..., ::2],
    "channels": lambda x: torch.cat([x[:, 4:], x[:, :4]], 1),
    "lengths": lambda x: torch.cat([x, 2 * x], -1),
    "padded": lambda x: functional.pad(x, (1, 2)),
    "padded_channels": lambda x: functional.pad(x[:, 2:], (1, 0, 1, 1), value=0.5),
    "reflected": lambda x: functional.pad(x, (2, 1), mode="reflect"),
}


@pytest.mark.parametrize("name", LIFTED)
def test_what_lies_between_convolutions_is_lifted_with_them(export: Export, name: str) -> None:
    found = lift_between(export, LIFTED[name])
    assert found.count(aten.conv2d.default) == 2
    assert found.count(aten.squeeze.dim) == 1
    assert found[-1] is aten.squeeze.dim


LEFT: dict[str, Callable[[Tensor], Tensor]] = {
    "sorted": lambda x: x.sort(-1).values,
    "transposed": lambda x: x.transpose(1, 2).softmax(-1).transpose(1, 2),
    "greatest": lambda x: x.amax(-1, keepdim=True),
    "per_position": lambda x: x + torch.linspace(0, 1, 17),
    "mean_over_channels": lambda x: x - x.mean(1, keepdim=True),
    "with_nothing": lambda x: torch.cat([x, torch.empty(0)], 2),
    "layer_norm": lambda x: functional.layer_norm(x, (17,)),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_has_no_counterpart_reads_signals_as_before(export: Export, name: str) -> None:
    assert lift_between(export, LEFT[name]).count(aten.squeeze.dim) > 1


def test_every_node_knows_its_shape(export: Export, network: Network) -> None:
    module, inputs = network("signal")
    exported = export(module, inputs)
    lift_to_two_dimensions(exported)
    shapes: dict[str, tuple[int, ...]] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            result = super().run_node(n)
            if isinstance(result, Tensor):
                shapes[n.name] = tuple(result.shape)
            return result

    with torch.no_grad():
        Recorder(exported).run(inputs[:2])
    said = {node.name: node.meta["val"].shape for node in exported.graph.nodes if node.name in shapes}
    assert said.keys() == shapes.keys()
    assert all(tuple(said[name])[1:] == shape[1:] for name, shape in shapes.items())


def test_the_users_model_keeps_its_weights(export: Export, network: Network) -> None:
    module, inputs = network("signal")
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    exported = export(module, inputs)
    lift_to_two_dimensions(exported)
    after = module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert "stem.weight" not in exported.state_dict()
    assert exported.state_dict()["stem.weight_2d"].shape == (8, 3, 1, 5)


def test_a_weight_that_two_convolutions_share_is_shared_afterwards(export: Export) -> None:
    shared = nn.Conv1d(3, 3, 3, padding=1)
    exported = export(nn.Sequential(shared, nn.ReLU(), shared), torch.randn(2, 3, 17))
    lift_to_two_dimensions(exported)
    weights = [node.args[1].target for node in exported.graph.nodes if node.target is aten.conv2d.default]
    assert len(weights) == 2
    assert len({id(attrgetter(weight)(exported)) for weight in weights}) == 1


def test_two_convolutions_that_read_one_signal_read_one_image(export: Export) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv1d(3, 4, 3), nn.Conv1d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.a(x) - self.b(x)
            return result

    module, inputs = Two(), torch.randn(2, 3, 17)
    exported = export(module, inputs)
    lift_to_two_dimensions(exported)
    assert operators(exported).count(aten.unsqueeze.default) == 1
    with torch.no_grad():
        torch.testing.assert_close(exported(inputs), module(inputs))


def test_a_convolution_of_a_single_sample_is_left_alone(export: Export) -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.pattern = nn.Conv1d(3, 3, 3, padding=1), nn.Parameter(torch.randn(3, 17))

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = x + self.a(self.pattern)
            return result

    module, inputs = Single(), torch.randn(2, 3, 17)
    exported = export(module, inputs)
    assert lift_to_two_dimensions(exported) == 0
    with torch.no_grad():
        torch.testing.assert_close(exported(inputs), module(inputs))


def test_a_weight_never_takes_the_name_of_another(export: Export) -> None:
    class Named(nn.Conv1d):
        def __init__(self) -> None:
            super().__init__(3, 3, 1)
            self.weight_2d = nn.Parameter(torch.randn(3, 3, 1, 1))

        def forward(self, input: Tensor) -> Tensor:
            signal = functional.conv1d(input, self.weight, self.bias)
            return functional.conv2d(signal.unsqueeze(2), self.weight_2d)

    module, inputs = Named(), torch.randn(2, 3, 17)
    exported = export(module, inputs)
    assert lift_to_two_dimensions(exported) == 1
    with torch.no_grad():
        torch.testing.assert_close(exported(inputs), module(inputs))


def test_a_network_on_images_is_left_alone(export: Export, network: Network) -> None:
    exported = export(*network("residual"))
    before = exported.code
    assert lift_to_two_dimensions(exported) == 0
    assert exported.code == before


def test_the_host_quantizes_every_convolution_with_what_belongs_into_its_kernel(
    network: Network, prepare: Callable[[nn.Module, Tensor], fx.GraphModule]
) -> None:
    """Of a network on signals as it is exported, the host quantizes those that ReLU follows."""
    prepared = prepare(*network("signal"))
    convolutions = [node for node in prepared.graph.nodes if node.target is aten.conv2d.default]
    assert len(convolutions) == 7
    for node in convolutions:
        x, weight = node.args[:2]
        assert str(x.target).startswith("activation_post_process")
        assert str(weight.target).startswith("activation_post_process")
    activations = [node for node in prepared.graph.nodes if node.target in (aten.relu.default, aten.hardswish.default)]
    behind = {node.args[0].target for node in activations}
    assert aten.squeeze.dim not in behind
