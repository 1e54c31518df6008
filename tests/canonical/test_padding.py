from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from inc_clusterq.canonical.padding import IN_NUMBERS, write_padding_as_numbers

Export = Callable[[nn.Module, Tensor], fx.GraphModule]


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv2d(3, 4, 3, padding="same"), (8, 9)),
        (nn.Conv2d(3, 4, (2, 5), padding="same", dilation=(3, 1)), (8, 9)),  # three in all, and four
        (nn.Conv2d(3, 4, 3, 2, padding="valid"), (8, 9)),
        (nn.Conv2d(3, 6, 4, padding="same", groups=3, bias=False), (8, 9)),
        (nn.Conv1d(3, 4, 4, padding="same", dilation=3), (17,)),
        (nn.Conv3d(3, 4, (2, 3, 4), padding="same"), (4, 5, 6)),
    ],
    ids=lambda value: str(value).replace(" ", "") if isinstance(value, nn.Module) else None,
)
def test_padding_in_words_and_in_numbers_is_the_same_to_the_bit(
    export: Export, layer: nn.Module, size: tuple[int, ...]
) -> None:
    inputs = torch.randn(5, 3, *size, generator=torch.Generator().manual_seed(0))
    exported = export(layer, inputs)
    assert write_padding_as_numbers(exported) == 1
    assert not [node for node in exported.graph.nodes if node.target in IN_NUMBERS]
    with torch.no_grad():
        assert torch.equal(exported(inputs), layer(inputs))


def test_the_size_of_what_is_padded_is_known(export: Export) -> None:
    exported = export(nn.Conv2d(3, 4, (2, 4), padding="same"), torch.randn(2, 3, 8, 9))
    write_padding_as_numbers(exported)
    (padded,) = [node for node in exported.graph.nodes if node.target is torch.ops.aten.pad.default]
    assert tuple(padded.meta["val"].shape[1:]) == (3, 9, 10)


def test_numbers_stay_as_they_are(export: Export) -> None:
    exported = export(nn.Conv2d(3, 4, 3, padding=1), torch.randn(2, 3, 8, 9))
    before = exported.code
    assert write_padding_as_numbers(exported) == 0
    assert exported.code == before


def test_the_host_quantizes_convolutions_whose_padding_was_a_word(
    network: Callable[[str], tuple[nn.Module, Tensor]], prepare: Callable[[nn.Module, Tensor], fx.GraphModule]
) -> None:
    """Without the rewriting, its quantizer raises."""
    prepared = prepare(*network("worded"))
    weights = [node.args[1] for node in prepared.graph.nodes if node.target is torch.ops.aten.conv2d.default]
    assert len(weights) == 4
    assert all(str(weight.target).startswith("activation_post_process") for weight in weights)
