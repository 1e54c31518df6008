from __future__ import annotations

import math

import pytest
import torch

from inc_clusterq.reconstruction.rounding import beta_at, initial_v, regulariser, soft_rounding


def test_the_start_reproduces_the_fraction() -> None:
    fraction = torch.linspace(0, 0.999, 300, dtype=torch.float64)
    torch.testing.assert_close(soft_rounding(initial_v(fraction)), fraction, rtol=0, atol=1e-12)


def test_soft_rounding_is_the_papers_rectified_sigmoid() -> None:
    for v in (-1.5, -0.2, 0.0, 0.7, 2.1):
        assert float(soft_rounding(torch.tensor(v))) == pytest.approx(1.2 / (1 + math.exp(-v)) - 0.1, abs=1e-6)


def test_soft_rounding_reaches_both_integers_exactly() -> None:
    assert soft_rounding(torch.tensor([-30.0, -2.5, 2.5, 30.0])).tolist() == [0.0, 0.0, 1.0, 1.0]


def test_rounding_up_begins_where_v_is_positive() -> None:
    assert float(soft_rounding(torch.tensor(0.0))) == pytest.approx(0.5)


@pytest.mark.parametrize("beta", [2.0, 7.0, 20.0])
def test_the_regulariser_vanishes_at_the_integers_and_peaks_half_way(beta: float) -> None:
    assert float(regulariser(torch.tensor([-9.0, 9.0]), beta)) == 0.0
    values = [float(regulariser(v, beta)) for v in torch.linspace(-3, 3, 101)]
    assert max(values) == values[50] == pytest.approx(1.0)


def test_the_regulariser_is_the_papers_sum() -> None:
    v = torch.tensor([[0.3, -0.8], [1.1, 0.0]])
    by_hand = sum(1 - abs(2 * (1.2 / (1 + math.exp(-x)) - 0.1) - 1) ** 3 for x in v.flatten().tolist())
    assert float(regulariser(v, 3.0)) == pytest.approx(by_hand, rel=1e-5)


def test_the_regulariser_pushes_to_the_nearer_integer() -> None:
    v = torch.tensor([-0.5, 0.5], requires_grad=True)
    regulariser(v, 2.0).backward()
    assert v.grad is not None
    down, up = v.grad.tolist()
    assert down > 0 > up  # descent lowers the first and raises the second


def test_the_exponent_waits_for_the_warm_up_and_then_falls_linearly() -> None:
    at = [beta_at(step, 100, 20.0, 2.0, 0.2) for step in range(101)]
    assert at[:20] == [None] * 20
    assert at[20] == 20.0
    assert at[60] == pytest.approx(11.0)
    assert at[100] == pytest.approx(2.0)


def test_without_warm_up_the_exponent_counts_from_the_first_step() -> None:
    assert beta_at(0, 10, 20.0, 2.0, 0.0) == 20.0


def test_a_single_step_has_an_exponent() -> None:
    assert beta_at(0, 1, 20.0, 2.0, 0.2) is None
    assert beta_at(0, 1, 20.0, 2.0, 0.0) == 20.0
