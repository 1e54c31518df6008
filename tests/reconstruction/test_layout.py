from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from inc_clusterq.layout import images_of, in_order, laid_out, shaped
from inc_clusterq.reconstruction.checkpoint import UnitStore
from inc_clusterq.reconstruction.dropping import draw_mask
from inc_clusterq.reconstruction.graph import extract, partition
from inc_clusterq.reconstruction.learning import Flow
from inc_clusterq.reconstruction.quantizers import QuantizedGraph
from inc_clusterq.reconstruction.reconstruct import reconstruct
from inc_clusterq.reconstruction.settings import ReconstructionSettings
from inc_clusterq.reconstruction.shelf import Shelf
from inc_clusterq.reconstruction.sums import PRODUCTS, inner, squared_error

LAST = torch.channels_last


def test_maps_are_laid_out_with_channels_last_and_all_else_is_left() -> None:
    maps, signals = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4)
    assert laid_out(maps).is_contiguous(memory_format=LAST)
    assert torch.equal(laid_out(maps), maps)
    assert laid_out(signals) is signals
    assert in_order(laid_out(maps)).tolist() == maps.permute(0, 2, 3, 1).flatten().tolist()
    assert in_order(maps).data_ptr() == maps.data_ptr()


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1), (2, 3, 4), (7,)])
@pytest.mark.parametrize("last", [True, False])
def test_what_is_made_after_a_tensor_lies_as_it_does(tmp_path: Path, shape: tuple[int, ...], last: bool) -> None:
    like = laid_out(torch.randn(shape)) if last else torch.randn(shape)
    chosen = torch.tensor([len(like) - 1, 0, 0])
    for made in (
        draw_mask(like, 0.5, torch.Generator().manual_seed(0)),
        draw_mask(like, 0.3, torch.Generator().manual_seed(0)),
        Shelf(1e9).empty(shape, like),
        Shelf(0, tmp_path).empty(shape, like),
        shaped(torch.empty(like.numel()), shape, like),
    ):
        assert made.shape == like.shape
        assert made.stride() == like.stride()
    assert torch.equal(images_of(like, chosen), like[chosen])
    assert images_of(like, chosen).stride() == like[chosen].stride()


@pytest.mark.parametrize("orders", [(True, True), (True, False), (False, False)])
def test_sums_are_those_of_double_precision(orders: tuple[bool, bool]) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (6, 10, 90, 90)
    assert torch.Size(shape).numel() > PRODUCTS
    a, b = (laid_out(x) if last else x for x, last in zip(torch.randn(2, *shape, generator=generator), orders, strict=True))
    wanted = (a.double() - b.double()).square()
    a.requires_grad_()
    with torch.enable_grad():
        error = squared_error(a, b)
        (3 * error).backward()
    assert error.item() == pytest.approx(float(wanted.sum()), rel=1e-6)
    assert a.grad is not None
    torch.testing.assert_close(a.grad, 6 * (a.detach() - b))
    exact = float((a.detach().double() * b.double()).sum())
    assert float(inner(a.detach(), b)) == pytest.approx(exact, abs=1e-6 * float(a.detach().norm() * b.norm()))


class Ordered(nn.Module):
    """Takes its maps apart as they lie in memory, in one of the ways that there are."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.convolution = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.convolution(x))
        if self.way == "view":
            x = x.view(x.shape[0], -1)
        elif self.way == "view_as":
            x = x.view_as(torch.zeros(x.shape[0], 8 * 36))
        else:
            x = x.as_strided((x.shape[0], 8 * 36), (8 * 36, 1))
        logits: Tensor = self.head(x)
        return logits


@pytest.mark.parametrize("way", ["view", "view_as", "as_strided"])
def test_a_network_that_asks_how_its_maps_lie_computes_the_same(
    prepare: Callable[[nn.Module, Tensor], fx.GraphModule], way: str
) -> None:
    torch.manual_seed(0)
    network, inputs = Ordered(way).eval().requires_grad_(False), torch.randn(8, 3, 6, 6)
    graph = prepare(network, inputs)
    expected = network(inputs)
    if way == "as_strided":
        assert not torch.allclose(network(laid_out(inputs)), expected)
    else:
        with pytest.raises(RuntimeError, match="view size is not compatible"):
            network(laid_out(inputs))
    x = laid_out(inputs)
    for unit in partition(graph):
        x = extract(graph, unit)(x)
    torch.testing.assert_close(x, expected)


def test_units_learn_from_maps_with_channels_last(
    network: Callable[[str], tuple[nn.Module, Tensor]],
    quantized: Callable[..., QuantizedGraph],
    quick: Callable[..., ReconstructionSettings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Tensor] = []

    def watched(module: fx.GraphModule, flow: Flow, *rest: Any) -> None:
        seen.extend(maps for maps in (flow.float_inputs, flow.quantized_inputs, flow.targets) if maps.dim() == 4)

    monkeypatch.setattr("inc_clusterq.reconstruction.reconstruct.optimise", watched)
    (_, inputs), settings = network("residual"), quick(granularity="layer", end_to_end_iterations=0)
    reconstruct(quantized("residual", settings), inputs, settings, seed=0, store=UnitStore())
    assert len(seen) > 3
    assert all(maps.is_contiguous(memory_format=LAST) for maps in seen)
