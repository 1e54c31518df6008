from __future__ import annotations

import pytest
import torch

from inc_clusterq.reconstruction.mixing import Mixture, without_data
from inc_clusterq.reconstruction.settings import ReconstructionSettings


def test_a_mixture_is_a_share_of_the_image_and_the_rest_of_the_other_one() -> None:
    images = torch.tensor([[[[8.0]]], [[[0.0]]], [[[4.0]]]])
    mixture = Mixture(torch.tensor([0.25, 0.5, 1.0]), torch.tensor([2, 0, 1]))
    assert mixture.of(images).flatten().tolist() == [0.25 * 8 + 0.75 * 4, 0.5 * 0 + 0.5 * 8, 4]


def test_whatever_belongs_to_an_image_is_mixed_alike() -> None:
    mixture = Mixture.draw(6, torch.Generator().manual_seed(0))
    images = torch.randn(6, 3, 4, 4)
    assert torch.allclose(mixture.of(images).flatten(1), mixture.of(images.flatten(1)))
    assert torch.allclose(mixture.of(2 * images + 1), 2 * mixture.of(images) + 1, atol=1e-6)


def test_shares_are_uniform_and_every_image_is_the_other_one_once() -> None:
    mixture = Mixture.draw(10_000, torch.Generator().manual_seed(0))
    assert mixture.other.sort().values.tolist() == list(range(10_000))
    assert torch.allclose(torch.histc(mixture.share, 4, 0, 1) / 10_000, torch.tensor(0.25), atol=0.02)


def test_one_seed_draws_one_mixture() -> None:
    first, same, other = (Mixture.draw(8, torch.Generator().manual_seed(seed)).share for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("shape", "bits", "said", "expected"),
    [
        ((3, 96, 128), 4, None, True),
        ((3, 96, 128), 7, None, True),
        ((3, 96, 128), 8, None, False),
        ((3, 95, 128), 4, None, False),  # small images were not tried
        ((128,), 4, None, False),
        ((3, 96, 128), 4, False, False),
        ((3, 32, 32), 8, True, True),
    ],
)
def test_without_data_large_images_are_mixed_below_8_bits_unless_the_user_said(
    shape: tuple[int, ...], bits: int, said: bool | None, expected: bool
) -> None:
    settings = ReconstructionSettings(mixtures=said, iterations=7)
    assert without_data(settings, shape, bits) == ReconstructionSettings(mixtures=expected, iterations=7)
