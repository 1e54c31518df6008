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


def test_a_kernel_that_depends_on_the_input_stays_computed(export: Export) -> None:
    class Dynamic(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return functional.conv2d(x, x.mean((0, 2, 3)).view(1, 3, 1, 1).expand(4, 3, 1, 1))

    exported = export(Dynamic(), torch.randn(2, 3, 8, 8))
    before = exported.code
    assert compute_weights(exported) == 0
    assert exported.code == before
