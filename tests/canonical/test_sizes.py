from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from inc_clusterq.canonical.sizes import write_sizes_in_full
from inc_clusterq.nodes import named_arguments

Export = Callable[[nn.Module, Tensor], fx.GraphModule]


class Functional(nn.Module):
    """A convolution as a function, with the sizes that it is given."""

    def __init__(self, operator: Callable[..., Tensor], axes: int, **sizes: object) -> None:
        super().__init__()
        self.operator, self.sizes = operator, sizes
        self.weight = nn.Parameter(torch.randn(4, 4, *[3] * axes))

    def forward(self, x: Tensor) -> Tensor:
        return self.operator(x, self.weight, **self.sizes)


@pytest.mark.parametrize(
    ("operator", "axes", "sizes", "expected"),
    [
        (functional.conv2d, 2, {"stride": [2], "padding": [1]}, {"stride": [2, 2], "padding": [1, 1]}),
        (functional.conv2d, 2, {"padding": "same", "dilation": [2]}, {"padding": "same", "dilation": [2, 2]}),
        (functional.conv2d, 2, {"stride": [2, 1], "dilation": [2]}, {"stride": [2, 1], "dilation": [2, 2]}),
        (functional.conv3d, 3, {"stride": [2], "padding": [1]}, {"stride": [2, 2, 2], "padding": [1, 1, 1]}),
        (functional.conv_transpose2d, 2, {"stride": [2], "output_padding": [1]}, {"stride": [2, 2], "output_padding": [1, 1]}),
    ],
)
def test_one_value_for_all_axes_becomes_one_for_each(
    export: Export, operator: Callable[..., Tensor], axes: int, sizes: dict[str, object], expected: dict[str, object]
) -> None:
    module, inputs = Functional(operator, axes, **sizes), torch.randn(2, 4, *[9] * axes)
    exported = export(module, inputs)
    assert write_sizes_in_full(exported) == 1
    (node,) = [node for node in exported.graph.nodes if node.op == "call_function"]
    found = named_arguments(node)
    assert {name: found[name] for name in expected} == expected
    with torch.no_grad():
        assert torch.equal(exported(inputs), module(inputs))


@pytest.mark.parametrize("module", [nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.Conv1d(4, 4, 3)])
def test_what_is_written_in_full_stays_as_it_is(export: Export, module: nn.Module) -> None:
    exported = export(module, torch.randn(2, 4, 9, 9) if isinstance(module, nn.Conv2d) else torch.randn(2, 4, 9))
    before = exported.code
    assert write_sizes_in_full(exported) == 0
    assert exported.code == before
