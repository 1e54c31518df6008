from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

aten = torch.ops.aten


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(3, 8, 3, padding=(2, 1), padding_mode="circular"),
        nn.Conv2d(3, 8, 3, padding="same", padding_mode="replicate"),
    ],
    ids=["reflect", "circular", "replicate"],
)
def test_the_host_quantizes_convolutions_whose_module_pads(
    prepare: Callable[[nn.Module, Tensor], fx.GraphModule], layer: nn.Module
) -> None:
    """At the padding it would raise."""
    module = nn.Sequential(layer, nn.ReLU()).eval()
    inputs = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    prepared = prepare(module, inputs)
    (node,) = [node for node in prepared.graph.nodes if node.target is aten.conv2d.default]
    assert str(node.args[1].target).startswith("activation_post_process")
