from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from inc_clusterq.deployment.backend import QUANTIZE
from inc_clusterq.deployment.fusion import clamp_before_quantize, fuse_clamps
from inc_clusterq.deployment.qdq import convert
from inc_clusterq.reconstruction.quantizers import QuantizedGraph

aten = torch.ops.aten
Network = Callable[[str], tuple[nn.Module, Tensor]]
Reconstructed = Callable[..., QuantizedGraph]


def targets_before_quantize(graph_module: fx.GraphModule) -> list[object]:
    return [node.args[0].target for node in graph_module.graph.nodes if node.target is QUANTIZE]


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("name", ["residual", "depthwise", "concat"])
def test_no_clamp_is_left_in_front_of_a_quantize_node_and_nothing_changes(
    reconstructed: Reconstructed, network: Network, name: str, bits: int
) -> None:
    _, inputs = network(name)
    converted = convert(reconstructed(name, bits))
    with torch.no_grad():
        expected = [converted(scale * inputs) for scale in (1.0, 4.0)]
        before = targets_before_quantize(converted)
        left = fuse_clamps(converted)
        assert aten.clamp.default in before
        assert aten.clamp.default not in targets_before_quantize(converted)
        assert all(torch.equal(converted(scale * inputs), kept) for scale, kept in zip((1.0, 4.0), expected, strict=True))
    on_integers = [node for node in converted.graph.nodes if node.target is aten.clamp.default]
    assert len(on_integers) == left
    assert all(node.args[0].target is QUANTIZE and node.args[1:] == (None, 2**bits - 1) for node in on_integers)


def test_clamps_of_integers_go_back_to_where_they_were(reconstructed: Reconstructed, network: Network) -> None:
    _, inputs = network("residual")
    converted = convert(reconstructed("residual", 4))
    limits = {node.args[1:] for node in converted.graph.nodes if node.target is aten.clamp.default}
    with torch.no_grad():
        expected = converted(4 * inputs)
        left = fuse_clamps(converted)
        clamp_before_quantize(converted)
        assert torch.equal(converted(4 * inputs), expected)
    back = [node.args[1:] for node in converted.graph.nodes if node.target is aten.clamp.default]
    assert len(back) == left > 0
    assert set(back) <= limits
