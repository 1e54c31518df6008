from __future__ import annotations

import pytest
import torch

from inc_clusterq.difference import largest_difference

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
