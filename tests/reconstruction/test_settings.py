from __future__ import annotations

import pytest

from inc_clusterq.reconstruction.settings import ReconstructionSettings


@pytest.mark.parametrize(("iterations", "rate"), [(400, 0.06), (1000, 0.03), (2500, 0.015), (0, 1.0), (1, 1.0)])
def test_the_rounding_moves_the_faster_the_fewer_steps_it_has(iterations: int, rate: float) -> None:
    assert ReconstructionSettings(iterations=iterations).rounding_rate == pytest.approx(rate)


def test_a_given_rate_stays_whatever_the_number_of_steps() -> None:
    assert ReconstructionSettings(iterations=400, weight_learning_rate=1e-3).rounding_rate == 1e-3
