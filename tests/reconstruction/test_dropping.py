from __future__ import annotations

import pytest
import torch

from inc_clusterq.reconstruction.dropping import draw_mask


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_each_element_is_dropped_with_the_given_probability_and_alone(probability: float) -> None:
    generator = torch.Generator().manual_seed(0)
    mask = draw_mask(torch.empty(200, 1000), probability, generator)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    # Bounds are four standard deviations of a binomial share.
    share = (probability * (1 - probability)) ** 0.5
    assert float((mask.mean(0) - probability).abs().max()) < 5 * share / 200**0.5
    assert float(mask.mean()) == pytest.approx(probability, abs=4 * share / 200_000**0.5)
    for distance in (1, 16, 64):  # neighbours, and the same place in a neighbouring table row or word
        both = float((mask[:, :-distance] * mask[:, distance:]).mean())
        assert both == pytest.approx(probability**2, abs=0.01)


@pytest.mark.parametrize("probability", [0.3, 0.5])
@pytest.mark.parametrize("shape", [(1,), (63,), (3, 5, 7), (64, 2)])
def test_a_mask_has_the_shape_and_type_of_its_tensor_and_follows_its_generator(
    probability: float, shape: tuple[int, ...]
) -> None:
    like = torch.empty(shape, dtype=torch.float64)
    first, again = (draw_mask(like, probability, torch.Generator().manual_seed(1)) for _ in range(2))
    assert first.shape == like.shape
    assert first.dtype == like.dtype
    assert torch.equal(first, again)


def test_mixing_by_a_mask_is_exact() -> None:
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(10_000, generator=generator) * 1e3, torch.randn(10_000, generator=generator) * 1e-3
    mask = draw_mask(a, 0.5, generator)
    assert torch.equal(torch.lerp(a, b, mask), torch.where(mask.bool(), b, a))
