from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from networks import NETWORKS
from neural_compressor.torch.algorithms.pt2e_quant.core import W8A8PT2EQuantizer
from neural_compressor.torch.quantization import INT8StaticQuantConfig
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from inc_clusterq.canonical import canonicalise
from inc_clusterq.nodes import is_observer

aten = torch.ops.aten
INPUTS = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Cosine(nn.Linear):
    """A linear layer with rows of length 1."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, functional.normalize(self.weight))


LAYERS = {
    "reflect": nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
    "circular": nn.Conv2d(3, 8, 3, padding=(2, 1), padding_mode="circular"),
    "replicate": nn.Conv2d(3, 8, 3, padding="same", padding_mode="replicate"),
    "signal": nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 8, 3, padding=1, padding_mode="reflect")),
    "normalised": parametrizations.weight_norm(nn.Conv2d(3, 8, 3)),
    "derived": nn.Sequential(nn.Flatten(), Cosine(192, 8)),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_the_host_quantizes_layers_whose_module_holds_more(name: str, strict: bool) -> None:
    """At the padding it would raise; not strict is the host's second try, which knows no functions."""
    graph = prepared(nn.Sequential(LAYERS[name], nn.ReLU()), strict).graph
    (node,) = [node for node in graph.nodes if node.target in {aten.conv2d.default, aten.linear.default}]
    assert is_observer(node.args[1])


class Activated(nn.Module):
    """An activation function behind a convolution, behind a sum and behind a linear layer, the first two in front of pools."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.pool, self.three, self.head = nn.MaxPool2d(2), nn.Linear(8, 16), nn.Linear(16, 5)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.activation(self.one(x)))
        x = functional.adaptive_avg_pool2d(self.activation(x + self.two(x)), 1).flatten(1)
        result: Tensor = self.head(self.activation(self.three(x)))
        return result


FORMS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "torch.relu": (nn.ReLU(), torch.relu),
    "method": (nn.ReLU(), lambda x: x.relu()),
    "function in place": (nn.ReLU(), lambda x: functional.relu(x, inplace=True)),
    "clamp from below": (nn.ReLU(), lambda x: x.clamp(min=0)),
    "clamp_min": (nn.ReLU(), lambda x: torch.clamp_min(x, 0)),
    "clamp_min in place": (nn.ReLU(), lambda x: x.clamp_min_(0)),
    "functional.relu6": (nn.ReLU6(), functional.relu6),
    "clamp": (nn.ReLU6(), lambda x: x.clamp(0, 6)),
    "functional.hardtanh": (nn.Hardtanh(-1, 2), lambda x: functional.hardtanh(x, -1, 2)),
    "functional.hardswish": (nn.Hardswish(), functional.hardswish),
    "functional.silu": (nn.SiLU(), functional.silu),
    "functional.leaky_relu": (nn.LeakyReLU(), functional.leaky_relu),
    "functional.gelu": (nn.GELU(), functional.gelu),
    "torch.tanh": (nn.Tanh(), torch.tanh),
}


@pytest.mark.filterwarnings("ignore:The input of .* is not quantized")  # the host knows pools behind some of them alone
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_functions_are_quantized_around_as_the_modules_of_activation_functions_are(form: str, strict: bool) -> None:
    """The module's own places are those of the host where each call has a module, which is what it was written for."""
    module, function = FORMS[form]
    wanted = _places(prepared(Activated(module), strict=True))
    assert _places(prepared(Activated(function), strict)) == wanted
    assert _places(prepared(Activated(module), strict)) == wanted  # one module, called three times


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_an_export_that_is_not_strict_is_quantized_at_the_same_places(
    network: Callable[[str], tuple[nn.Module, Tensor]], name: str
) -> None:
    module, inputs = network(name)
    assert _places(prepared(module, False, inputs)) == _places(prepared(module, True, inputs))


def prepared(module: nn.Module, strict: bool, inputs: Tensor = INPUTS) -> fx.GraphModule:
    """The host's observed graph of what is exported."""
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    exported = torch.export.export(module.eval(), (inputs[:2],), dynamic_shapes=shapes, strict=strict).module()
    assert isinstance(exported, fx.GraphModule)
    canonicalise(exported)
    with torch.no_grad():
        torch.testing.assert_close(exported(inputs), module(inputs))
    exported._exported = True  # type: ignore[assignment]  # the host's mark
    found: fx.GraphModule = W8A8PT2EQuantizer(quant_config=INT8StaticQuantConfig()).prepare(exported)
    return found


def _places(graph_module: fx.GraphModule) -> list[tuple[str, list[bool]]]:
    """Operators on tensors, each with which of those that it reads are quantized."""
    return [
        (node.target.name().removesuffix("_"), [is_observer(argument) for argument in node.all_input_nodes])
        for node in graph_module.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and isinstance(node.meta.get("val"), Tensor)
    ]
