from __future__ import annotations

import pytest
import torch

from inc_clusterq.difference import drawn_in, largest_difference

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("found", "expected", "difference"),
    [
        ([1.0, -4.0], [1.0, -5.0], 0.2),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([1.0, NAN, -INF], [2.0, NAN, -INF], 0.5),
        ([1.0, NAN], [1.0, 2.0], INF),
        ([1.0, 2.0], [1.0, INF], INF),
        ([NAN], [NAN], 0.0),
    ],
)
def test_it_is_a_share_of_the_largest_value(found: list[float], expected: list[float], difference: float) -> None:
    assert largest_difference(torch.tensor(found), torch.tensor(expected)) == pytest.approx(difference)


@pytest.mark.parametrize("mask", [-1e9, -1e4, 1e6])
def test_a_class_that_is_masked_out_hides_no_difference(mask: float) -> None:
    expected = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    apart = torch.zeros(3, 10)
    apart[:, 1] = 1
    plain = largest_difference(expected + apart, expected)
    expected[:, 4] = mask
    assert largest_difference(expected + apart, expected) > plain / 50


@pytest.mark.parametrize("shape", [(3, 10), (64, 1000), (2, 1), (5, 2), (4, 3, 8, 8), (4,), (0, 3)])
def test_outputs_without_such_a_class_stay_as_they_are_to_the_bit(shape: tuple[int, ...]) -> None:
    outputs = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(7).sub(3)
    assert drawn_in(outputs).equal(outputs)
    assert drawn_in(outputs.relu()).equal(outputs.relu())


def test_two_classes_that_are_far_apart_are_no_masks() -> None:
    outputs = torch.tensor([[5.0, -5.0], [-4.0, 6.0], [5.0, -6.0]])
    assert drawn_in(outputs).equal(outputs)


def test_what_a_masked_class_still_says_stays() -> None:
    outputs = torch.randn(8, 9, generator=torch.Generator().manual_seed(0))
    lifted = outputs.clone()
    lifted[:, 3] += 512
    drawn = drawn_in(lifted)
    torch.testing.assert_close(drawn.sub(drawn.mean(0)), outputs.sub(outputs.mean(0)), atol=1e-3, rtol=0)
    assert drawn[:, 3].max() < 30
