from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inc_clusterq.reconstruction.ranges import EPSILON, activation_range, signed_levels, weight_scale

NORM = 2.4


def weight_error(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Lp error of each channel."""
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    quantized = (weight / scale).round().clamp(lowest, highest) * scale
    return (quantized - weight).double().abs().pow(NORM).flatten(1).sum(1)


def activation_error(sample: Tensor, scale: float, zero_point: int, bits: int) -> float:
    quantized = torch.fake_quantize_per_tensor_affine(sample, scale, zero_point, 0, 2**bits - 1)
    return float((quantized - sample).double().abs().pow(NORM).sum())


@pytest.fixture
def weight() -> Tensor:
    """Bell-shaped channels of different widths, one with an outlier and one lopsided."""
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 8, 3, 3, generator=rng) * torch.tensor([1e-3, 0.1, 1.0, 1.0, 1.0, 50.0]).reshape(6, 1, 1, 1)
    weight[2, 0, 0, 0] = 12.0
    weight[3] = weight[3].abs()
    weight[4] = -weight[4].abs()
    return weight


def test_signed_levels_are_those_of_twos_complement() -> None:
    assert [signed_levels(bits) for bits in (2, 4, 8)] == [(-2, 1), (-8, 7), (-128, 127)]


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_weight_scale_is_never_worse_than_one_that_covers_every_weight(weight: Tensor, bits: int) -> None:
    lowest, highest = signed_levels(bits)
    flat = weight.flatten(1)
    covering = torch.maximum(flat.amax(1) / highest, flat.amin(1) / lowest).reshape(-1, 1, 1, 1)
    scale = weight_scale(weight, bits, NORM)
    assert scale.shape == covering.shape
    # The last candidate is the covering scale itself, up to rounding.
    assert (weight_error(weight, scale, bits) <= weight_error(weight, covering, bits) * (1 + 1e-4)).all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_weight_scale_is_as_good_as_that_of_a_dense_search(weight: Tensor, bits: int) -> None:
    lowest, highest = signed_levels(bits)
    flat = weight.flatten(1)
    covering = torch.maximum(flat.amax(1) / highest, flat.amin(1) / lowest).reshape(-1, 1, 1, 1)
    dense = torch.stack([weight_error(weight, covering * share, bits) for share in torch.linspace(0.2, 1, 4000)])
    # Between two candidates of the search, 1 % of the scale apart, the error of 72 values moves by up to a tenth at 8 bits.
    assert (weight_error(weight, weight_scale(weight, bits, NORM), bits) <= 1.15 * dense.amin(0)).all()


def test_channels_that_are_zero_or_constant_get_a_finite_positive_scale() -> None:
    weight = torch.stack([torch.zeros(3, 3), torch.full((3, 3), 0.7), torch.full((3, 3), -0.7)])[:, None]
    scale = weight_scale(weight, 4, NORM)
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    quantized = (weight / scale).round().clamp(-8, 7) * scale
    assert torch.equal(quantized[0], weight[0])
    torch.testing.assert_close(quantized[1:], weight[1:], rtol=0.02, atol=0)  # one value lies on the grid within one step


def test_no_weight_scale_is_smaller_than_what_quantizers_and_the_host_keep() -> None:
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0)) * 1e-8
    assert (weight_scale(weight, 4, NORM) >= EPSILON).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shift", [-9.0, -0.5, 0.0, 0.5, 9.0])
def test_zero_is_exact_in_every_activation_range(bits: int, shift: float) -> None:
    sample = torch.randn(2000, generator=torch.Generator().manual_seed(1)) + shift
    scale, zero_point = activation_range(sample, float(sample.min()), float(sample.max()), bits, NORM)
    assert scale > 0
    assert isinstance(zero_point, int)
    assert 0 <= zero_point <= 2**bits - 1
    assert float(torch.fake_quantize_per_tensor_affine(torch.zeros(1), scale, zero_point, 0, 2**bits - 1)) == 0.0


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_an_activation_range_is_as_good_as_that_of_a_dense_search(bits: int) -> None:
    sample = torch.randn(4000, generator=torch.Generator().manual_seed(2))
    sample[0] = 15.0
    low, high, top = float(sample.min()), float(sample.max()), 2**bits - 1
    found = activation_error(sample, *activation_range(sample, low, high, bits, NORM), bits)
    dense = []
    for share in torch.linspace(0.2, 1, 1000).tolist():
        scale = (high - low) * share / top
        dense.append(activation_error(sample, scale, round(-low * share / scale), bits))
    assert found <= dense[-1]
    assert found <= 1.05 * min(dense)


def test_a_tensor_without_negative_values_keeps_its_zero_point_at_zero() -> None:
    sample = torch.rand(500, generator=torch.Generator().manual_seed(3))
    assert activation_range(sample, float(sample.min()), float(sample.max()), 4, NORM)[1] == 0


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_a_constant_tensor_gets_a_finite_range_that_holds_it(value: float) -> None:
    sample = torch.full((50,), value)
    scale, zero_point = activation_range(sample, value, value, 4, NORM)
    assert scale > 0
    quantized = torch.fake_quantize_per_tensor_affine(sample, scale, zero_point, 0, 15)
    torch.testing.assert_close(quantized, sample, rtol=0.02, atol=0)


def test_of_equally_good_ranges_the_widest_is_taken() -> None:
    """Where a map is so sparse that the sample holds zeros alone, what is not zero is not cut for nothing."""
    scale, zero_point = activation_range(torch.zeros(64), 0.0, 10.0, 8, NORM)
    assert scale == pytest.approx(10 / 255)
    assert zero_point == 0
