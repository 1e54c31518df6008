from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from inc_clusterq.deployment.backend import DEQUANTIZE
from inc_clusterq.deployment.inductor import compile_frozen
from inc_clusterq.deployment.pooling import write_ceil_mode
from inc_clusterq.deployment.qdq import convert
from inc_clusterq.reconstruction.quantizers import QuantizedGraph

aten = torch.ops.aten
Network = Callable[[str], tuple[nn.Module, Tensor]]
Reconstructed = Callable[..., QuantizedGraph]


@pytest.mark.parametrize("bits", [3, 8])
def test_sizes_that_round_up_become_rows_and_columns_of_the_lowest_level(
    reconstructed: Reconstructed, network: Network, bits: int
) -> None:
    _, inputs = network("pooled")
    converted = convert(reconstructed("pooled", bits))
    with torch.no_grad():
        expected = converted(inputs)
        assert write_ceil_mode(converted) == 3
        assert torch.equal(converted(inputs), expected)
    pools = [node for node in converted.graph.nodes if node.target is aten.max_pool2d.default]
    assert all(len(pool.args) == 5 and pool.args[0].target is DEQUANTIZE for pool in pools)
    pads = [node for node in converted.graph.nodes if node.target is aten.constant_pad_nd.default]
    assert [node.args[1] for node in pads] == [[0, 1, 0, 1], [0, 0, 0, 2]]


@pytest.mark.slow
def test_without_the_rewriting_the_compiler_leaves_the_last_row_and_column_out(
    reconstructed: Reconstructed, network: Network
) -> None:
    _, inputs = network("pooled")
    converted = convert(reconstructed("pooled", 8))
    example = inputs[:1]
    with torch.no_grad():
        expected = converted(example)
        spread = float(expected.max() - expected.min())
        wrong = compile_frozen(converted, example)(example)
        write_ceil_mode(converted)
        torch._dynamo.reset()
        right = compile_frozen(converted, example)(example)
    assert float((wrong - expected).abs().max()) > 0.05 * spread
    assert float((right - expected).abs().max()) < 0.02 * spread
