from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from inc_clusterq.deployment.backend import QUANTIZE
from inc_clusterq.deployment.inductor_operators import compile_and_list
from inc_clusterq.deployment.padding import quantize_before_padding
from inc_clusterq.deployment.qdq import convert
from inc_clusterq.deployment.saved import SavedModel
from inc_clusterq.reconstruction.quantizers import QuantizedGraph

aten = torch.ops.aten
Network = Callable[[str], tuple[nn.Module, Tensor]]


@pytest.mark.parametrize("bits", [2, 8])
def test_zero_padding_is_done_on_integers_and_no_other(
    reconstructed: Callable[..., QuantizedGraph], network: Network, bits: int
) -> None:
    _, inputs = network("padded")
    converted = convert(reconstructed("padded", bits))
    with torch.no_grad():
        expected = converted(inputs)
        assert quantize_before_padding(converted) == 1
        assert torch.equal(converted(inputs), expected)
    on_integers = [node for node in converted.graph.nodes if node.target is aten.constant_pad_nd.default]
    in_float = [node for node in converted.graph.nodes if node.target is aten.pad.default]
    assert [node.args[0].target for node in on_integers] == [QUANTIZE]
    assert [node.args[3] for node in in_float] == [0.5]
    assert quantize_before_padding(converted) == 0


def test_a_padded_shortcut_is_left_alone(reconstructed: Callable[..., QuantizedGraph]) -> None:
    assert quantize_before_padding(convert(reconstructed("residual", 4))) == 0


@pytest.mark.slow
def test_the_convolution_in_front_of_the_padding_writes_integers(saved: Callable[..., SavedModel]) -> None:
    model = saved("padded", 4)
    code = str(model.module.code)
    assert code.index("hardtanh") < code.index("constant_pad_nd")
    _, operators = compile_and_list(model.module, torch.zeros(1, *model.shape))
    convolutions = [found for found in operators if found.kind == "convolution"]
    assert [found.precision for found in convolutions] == ["int8"] * 3
