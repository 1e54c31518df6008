from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from inc_clusterq.canonical import canonicalise
from inc_clusterq.canonical.weights import compute_weights

Export = Callable[[nn.Module, Tensor], fx.GraphModule]
aten = torch.ops.aten


class Standardised(nn.Conv2d):
    """Weight standardisation (arXiv 1903.10520)."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / weight.std((1, 2, 3), keepdim=True)
        return functional.conv2d(input, weight, self.bias, self.stride, self.padding)


COMPUTED: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Conv2d(3, 8, 3)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Conv2d(3, 8, 3)),
    "standardised": lambda: Standardised(3, 8, 3),
    "one_dimension": lambda: nn.Sequential(
        nn.Flatten(2), parametrizations.weight_norm(nn.Conv1d(3, 8, 3)), nn.Unflatten(2, (62, 1))
    ),
}


def network(first: nn.Module) -> nn.Module:
    last = parametrizations.weight_norm(nn.Linear(8, 5))
    return nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), last).eval()


@pytest.mark.parametrize("name", COMPUTED)
def test_the_host_quantizes_what_it_would_raise_at(
    export: Export, prepare: Callable[[nn.Module, Tensor], fx.GraphModule], name: str
) -> None:
    inputs = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    module = network(COMPUTED[name]())
    exported = export(module, inputs)
    canonicalise(exported)
    with torch.no_grad():
        torch.testing.assert_close(exported(inputs), module(inputs))
    prepared = prepare(module, inputs)
    weights = [node.args[1] for node in prepared.graph.nodes if node.target in (aten.conv2d.default, aten.linear.default)]
    assert len(weights) == 2
    assert all(str(weight.target).startswith("activation_post_process") for weight in weights)


def test_nothing_of_the_computation_is_left(export: Export) -> None:
    exported = export(COMPUTED["standardised"](), torch.randn(2, 3, 8, 8))
    assert compute_weights(exported) == 1
    assert [node.target for node in exported.graph.nodes if node.op == "call_function"] == [aten.conv2d.default]
    assert compute_weights(exported) == 0


class Own(nn.Module):
    """A convolution whose weight `make` computes, from its own and the input."""

    def __init__(self, make: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.make = nn.Conv2d(3, 3, 3), make

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu_(functional.conv2d(x, self.make(self.layer.weight, x)))


def masked(weight: Tensor, x: Tensor) -> Tensor:
    weight = weight.clone()
    weight[:, :, 1:] = 0
    return weight


def long(weight: Tensor, x: Tensor) -> Tensor:
    for _ in range(600):
        weight = weight * 1.001
    return weight


STAY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "from_the_input": lambda weight, x: weight * x.mean(),
    "overwritten_with_the_input": lambda weight, x: weight.clone().copy_(x[0, :, :3, :3].expand(3, 3, 3, 3)),
    "random": lambda weight, x: weight + 0 * torch.rand_like(weight),
}


@pytest.mark.parametrize("name", STAY)
def test_what_is_not_a_constant_stays_computed(export: Export, name: str) -> None:
    module, inputs = Own(STAY[name]), torch.randn(5, 3, 8, 8)
    exported = export(module, inputs)
    before = exported.code
    assert compute_weights(exported) == 0
    assert exported.code == before
    with torch.no_grad():
        torch.testing.assert_close(exported(inputs), module(inputs))


CONSTANTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "scaled": lambda weight, x: 2 * weight,
    "long": long,
    "overwritten_through_a_view": masked,
    "overwritten": lambda weight, x: (weight + 1).mul_(0.5).clamp_(0, 0.55),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_are_computed_with_what_overwrites_them(export: Export, name: str) -> None:
    """The network overwrites activations too, which does not matter."""
    module, inputs = Own(CONSTANTS[name]), torch.randn(5, 3, 8, 8)
    kept = module.layer.weight.detach().clone()
    exported = export(module, inputs)
    assert compute_weights(exported) == 1
    (node,) = [node for node in exported.graph.nodes if node.target is aten.conv2d.default]
    assert node.args[1].op == "get_attr"
    assert torch.equal(module.layer.weight, kept)
    with torch.no_grad():
        torch.testing.assert_close(exported(inputs), module(inputs))
