"""Total variation, and the blocks in which it and the moments are computed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inc_clusterq.inputs import InputSpec
from inc_clusterq.synthesis import blocks
from inc_clusterq.synthesis.blocks import row_blocks
from inc_clusterq.synthesis.statistics import sample_moments
from inc_clusterq.synthesis.variation import total_variation

SHAPES = [(3, 5, 4), (2, 7), (1, 3, 4, 5), (2, 6, 1)]


def composed(x: Tensor, spec: InputSpec) -> Tensor:
    """The same from torch's own operations."""
    low, high = spec.bounds(x)
    unit = x / (high - low)
    return torch.stack([unit.diff(dim=axis).abs().mean() for axis in range(2, x.dim()) if x.shape[axis] > 1]).mean()


def test_it_has_its_hand_value() -> None:
    x = torch.tensor([[[[0.0, 1.0, 0.0], [0.0, 1.0, 2.0]]]])  # rows: |1|,|1|,|1|,|1|; columns: 0, 0, 2
    assert total_variation(x, InputSpec((1, 2, 3), 0, 4)).item() == pytest.approx((1 / 4 + 2 / 3 / 4) / 2)


@pytest.mark.parametrize("shape", [(5,), (5, 1)])
def test_without_neighbours_it_is_zero(shape: tuple[int, ...]) -> None:
    assert total_variation(torch.ones(2, *shape), InputSpec(shape)).item() == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradient_are_those_of_the_composed_term(shape: tuple[int, ...]) -> None:
    std = tuple(float(channel + 1) for channel in range(shape[0]))
    spec = InputSpec(shape, -2.0, 3.0, (0.5,), std)
    rng = torch.Generator().manual_seed(0)
    ours = torch.randn(4, *shape, generator=rng, dtype=torch.float64).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    value, wanted = total_variation(ours, spec), composed(theirs, spec)
    torch.testing.assert_close(value, wanted)
    (3 * value).backward()
    (3 * wanted).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize(("rows", "block"), [(7, 10), (7, 25), (1, 4), (5, 1000), (0, 8)])
def test_blocks_cover_every_row_once(rows: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", block)
    x = torch.arange(rows * 10).view(rows, 10)
    parts = [x[part] for part in row_blocks(x)]
    assert torch.equal(torch.cat([x[:0], *parts]), x)
    assert all(part.numel() <= max(block, 10) for part in parts)


def test_small_blocks_give_what_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = InputSpec((3, 6, 5), 0.0, 2.0)
    x = torch.randn(9, 3, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for size in (1, 300, 10**6):
        monkeypatch.setattr(blocks, "BLOCK", size)
        moments = sample_moments(x, 9)
        found.append((total_variation(x, spec), moments.mean, moments.variance))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])
