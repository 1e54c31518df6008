from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inc_clusterq.reconstruction.fake_quantize import ActivationQuantizer, BiasCorrection, Mode, WeightQuantizer

NORM = 2.4
SCALE = 0.1  # not a power of two, so that rounding errors show


def activation_quantizer(bits: int, zero_point: int, mode: Mode) -> ActivationQuantizer:
    quantizer = ActivationQuantizer(bits, NORM)
    quantizer.fix(SCALE, zero_point)
    quantizer.mode = mode
    return quantizer


def straight_through(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def lsq_plus(x: Tensor, scale: Tensor, zero_point: Tensor, top: int, dropped: Tensor) -> Tensor:
    """LSQ+ as plain autograd, in double precision; dropped elements pass."""
    zero_point = straight_through(zero_point)
    levels = straight_through(x / scale) + zero_point
    slack = 1e-9  # `straight_through` misses the integer by a rounding error, and the ends count as inside
    return torch.where(dropped, x, (levels.clamp(-slack, top + slack) - zero_point) * scale)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_hard_activations_are_those_of_the_deployed_operator(bits: int, share: float) -> None:
    top = 2**bits - 1
    zero_point = round(share * top)
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * SCALE * top
    x[:400] = (torch.arange(400) - 200 + 0.5) * SCALE  # on the borders between two integers
    expected = torch.fake_quantize_per_tensor_affine(x, SCALE, zero_point, 0, top)
    assert torch.equal(activation_quantizer(bits, zero_point, Mode.HARD)(x), expected)


@pytest.mark.parametrize("zero_point", [0, 5])
@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_learned_steps_have_the_gradients_of_lsq_plus(zero_point: int, drop: float) -> None:
    rng = torch.Generator().manual_seed(1)
    quantizer = activation_quantizer(4, zero_point, Mode.LEARN)
    quantizer.drop_probability, quantizer.generator = drop, torch.Generator().manual_seed(2)
    x = torch.randn(4, 6, 5, 5, generator=rng).requires_grad_()  # beyond the range on either side
    weights = torch.randn(4, 6, 5, 5, generator=rng)
    y = quantizer(x)
    (y * weights).sum().backward()
    found = [x.grad, quantizer.scale_shift.grad, quantizer.zero_point_shift.grad]

    dropped = (y == x).detach()  # no random value lies on the grid
    assert dropped.double().mean() == pytest.approx(drop, abs=0.08)
    quantizer.zero_grad()
    quantizer.double()
    reference_x = x.detach().double().requires_grad_()
    reference = lsq_plus(reference_x, *quantizer.parameters_now(), top=15, dropped=dropped)
    (reference * weights).sum().backward()
    torch.testing.assert_close(y.double(), reference, rtol=1e-5, atol=1e-6)
    expected = [reference_x.grad, quantizer.scale_shift.grad, quantizer.zero_point_shift.grad]
    if zero_point == 0:  # where nothing is below zero it is not learned
        assert found.pop() is None
        expected.pop()
    for gradient, wanted in zip(found, expected, strict=True):
        assert gradient is not None
        assert wanted is not None
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-5)
        assert float(wanted.abs().sum()) > 0


def test_dropped_elements_pass_to_the_bit_and_the_others_are_quantized() -> None:
    quantizer = activation_quantizer(4, 0, Mode.LEARN)
    quantizer.drop_probability, quantizer.generator = 0.5, torch.Generator().manual_seed(3)
    x = torch.rand(10_000, generator=torch.Generator().manual_seed(4)) * 3
    y = quantizer(x)
    quantized = torch.fake_quantize_per_tensor_affine(x, SCALE, 0, 0, 15)
    assert torch.equal(y, torch.where(y == x, x, quantized))
    assert 0.45 < float((y == x).double().mean()) < 0.55


def test_dropping_is_reproducible_from_its_generator() -> None:
    quantizer = activation_quantizer(4, 0, Mode.LEARN)
    x = torch.rand(1000)
    results = []
    for seed in (5, 5, 6):
        quantizer.drop_probability, quantizer.generator = 0.5, torch.Generator().manual_seed(seed)
        results.append(quantizer(x))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_nothing_is_dropped_in_what_is_deployed() -> None:
    quantizer = activation_quantizer(4, 0, Mode.HARD)
    quantizer.drop_probability = 1.0
    x = torch.rand(100)
    assert torch.equal(quantizer(x), torch.fake_quantize_per_tensor_affine(x, SCALE, 0, 0, 15))


@pytest.mark.parametrize("mode", [Mode.FLOAT, Mode.OBSERVE])
def test_open_quantizers_hand_on_what_they_get(mode: Mode) -> None:
    x = torch.randn(3, 4)
    assert torch.equal(activation_quantizer(4, 3, mode)(x), x)
    weights = WeightQuantizer(x, 4, NORM)
    weights.mode = mode
    assert torch.equal(weights(x), x)


def test_observed_extremes_count_even_where_only_a_sample_is_kept() -> None:
    quantizer = ActivationQuantizer(8, NORM)
    quantizer.mode = Mode.OBSERVE
    x = torch.rand(4, 60_000)
    x[2, 31_337] = -3.0
    quantizer(x)
    assert quantizer.observed
    quantizer.initialise()
    assert not quantizer.observed
    assert not quantizer.one_sided
    scale, zero_point = quantizer.deployed()
    assert scale == pytest.approx(4 / 255, rel=0.9)
    assert zero_point > 0


def test_the_zero_point_that_is_handed_over_is_an_integer_in_range() -> None:
    quantizer = activation_quantizer(4, 14, Mode.LEARN)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.add_(0.4)
    scale, zero_point = quantizer.deployed()
    assert scale > 0
    assert zero_point == 15
    quantizer.mode = Mode.HARD
    x = torch.randn(500) * 3
    assert torch.equal(quantizer(x), torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, 15))


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(5)) * torch.logspace(-4, 1, 8).reshape(8, 1, 1, 1)


def requantized(quantizer: WeightQuantizer, bits: int) -> Tensor:
    """The integers that the deployed operator makes of what is handed over."""
    scale = quantizer.start_scale.flatten()
    zeros = torch.zeros_like(scale, dtype=torch.int32)
    # The operator returns integers times scale; the quotient is an integer up to rounding.
    values = torch.fake_quantize_per_channel_affine(
        quantizer.deployed(), scale, zeros, 0, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    )
    return (values / quantizer.start_scale).round().to(torch.int8)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("learned", [False, True])
def test_what_is_handed_over_quantizes_to_exactly_the_chosen_integers(weight: Tensor, bits: int, learned: bool) -> None:
    quantizer = WeightQuantizer(weight, bits, NORM)
    with torch.no_grad():
        quantizer.v.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(6)))
    quantizer.harden(learned=learned)
    assert quantizer.integers.min() >= -(2 ** (bits - 1))
    assert quantizer.integers.max() <= 2 ** (bits - 1) - 1
    assert torch.equal(requantized(quantizer, bits), quantizer.integers.to(torch.int8))


def test_unlearned_rounding_is_to_the_nearest_integer(weight: Tensor) -> None:
    quantizer = WeightQuantizer(weight, 4, NORM)
    quantizer.harden(learned=False)
    assert torch.equal(quantizer.integers, (weight / quantizer.start_scale).round().clamp(-8, 7))


def test_learned_rounding_goes_to_either_neighbour(weight: Tensor) -> None:
    quantizer = WeightQuantizer(weight, 4, NORM)
    floor = (weight / quantizer.start_scale).floor()
    with torch.no_grad():
        quantizer.v.copy_(torch.where(torch.rand(weight.shape) < 0.5, -9.0, 9.0))
    up = quantizer.v.detach() > 0
    quantizer.harden(learned=True)
    assert torch.equal(quantizer.integers, (floor + up).clamp(-8, 7))
    quantizer.mode = Mode.HARD
    assert torch.equal(quantizer(weight), quantizer.integers * quantizer.start_scale)


def test_soft_weights_start_at_the_float_weights_and_stay_in_range(weight: Tensor) -> None:
    quantizer = WeightQuantizer(weight, 4, NORM)
    quantizer.mode = Mode.LEARN
    scale = quantizer.start_scale
    torch.testing.assert_close(quantizer(weight), weight.clamp(-8 * scale, 7 * scale), rtol=1e-4, atol=1e-6)


def test_hard_and_fully_decided_soft_weights_are_equal(weight: Tensor) -> None:
    quantizer = WeightQuantizer(weight, 3, NORM)
    with torch.no_grad():
        quantizer.v.sign_().mul_(9)
    quantizer.mode = Mode.LEARN
    soft = quantizer(weight).detach()
    quantizer.harden(learned=True)
    assert torch.equal(soft, quantizer.deployed())


@pytest.mark.parametrize("joint", [False, True])
def test_the_step_of_a_weight_is_learned_only_when_asked(weight: Tensor, joint: bool) -> None:
    quantizer = WeightQuantizer(weight, 3, NORM, joint)
    quantizer.mode = Mode.LEARN
    quantizer(weight).square().sum().backward()
    assert quantizer.v.grad is not None
    assert (quantizer.scale_shift.grad is not None) == joint


def test_a_learned_step_is_handed_over_with_the_integers_it_was_learned_for(weight: Tensor) -> None:
    quantizer = WeightQuantizer(weight, 3, NORM, joint=True)
    integers, before = quantizer.integers.clone(), quantizer.start_scale.clone()
    with torch.no_grad():
        quantizer.scale_shift.fill_(0.5)
    quantizer.harden(learned=True)
    assert torch.equal(quantizer.integers, integers)
    torch.testing.assert_close(quantizer.start_scale, before * torch.tensor(0.5).exp())
    assert torch.equal(requantized(quantizer, 3), quantizer.integers.to(torch.int8))


def test_a_bias_follows_the_weight_while_it_is_learned_and_stays_afterwards() -> None:
    weight, bias, mean = torch.randn(4, 3), torch.randn(4), torch.rand(1, 3)
    correction = BiasCorrection(bias)
    correction.start(weight + 1, wanted=weight @ mean[0], mean=mean, unit=torch.ones(4))
    correction.mode = Mode.FLOAT
    assert torch.equal(correction(bias, weight), bias)
    for mode, changed in ((Mode.HARD, weight + 1), (Mode.LEARN, weight + 1), (Mode.LEARN, weight * 3)):
        correction.mode = mode
        torch.testing.assert_close(changed @ mean[0] + correction(bias, changed), weight @ mean[0] + bias)
    with torch.no_grad():
        correction.c.fill_(0.5)
    correction.harden(weight * 3)
    correction.mode = Mode.HARD
    torch.testing.assert_close(weight * 3 @ mean[0] + correction(bias, weight * 7), weight @ mean[0] + bias + 0.5)


def test_a_fixed_correction_follows_no_weight_and_learns_on_top_of_what_it_is() -> None:
    weight, bias = torch.randn(4, 3), torch.randn(4)
    correction = BiasCorrection(bias)
    correction.start(weight, wanted=weight @ torch.ones(3), mean=torch.ones(1, 3), unit=torch.ones(4))
    correction.fix(torch.full((4,), 0.25), torch.full((4,), 2.0))
    correction.mode = Mode.LEARN
    assert torch.equal(correction(bias, weight * 7), bias + 0.25)
    with torch.no_grad():
        correction.c.fill_(0.5)
    torch.testing.assert_close(correction(bias, weight), bias + 1.25)
    for _ in range(2):  # what was learned is taken in once
        correction.harden(weight)
    correction.mode = Mode.HARD
    torch.testing.assert_close(correction(bias, weight), bias + 1.25)


def test_nothing_is_learned_of_a_bias_that_was_never_started() -> None:
    correction = BiasCorrection(torch.zeros(4))
    correction.mode = Mode.LEARN
    correction(torch.ones(4), torch.ones(4, 3)).sum().backward()
    assert correction.c.grad is not None
    assert not correction.c.grad.any()


def test_a_weight_learns_its_step_alone_and_keeps_its_integers(weight: Tensor) -> None:
    quantizer = WeightQuantizer(weight, 3, NORM, joint=True)
    integers = quantizer.integers.clone()
    quantizer.mode = Mode.STEPS
    torch.testing.assert_close(quantizer(weight), quantizer.deployed(), rtol=0, atol=0)
    quantizer(weight).square().sum().backward()
    assert quantizer.v.grad is None
    assert quantizer.scale_shift.grad is not None
    assert (quantizer.scale_shift.grad != 0).all()
    with torch.no_grad():
        quantizer.v.mul_(-1)
    quantizer.harden(learned=False)
    assert torch.equal(quantizer.integers, integers)


def test_a_restarted_weight_begins_at_the_given_levels() -> None:
    quantizer = WeightQuantizer(torch.randn(3, 4), 3, NORM)
    levels, scale = torch.tensor([[-4.2, -0.3, 0.2, 3.3]]).repeat(3, 1), torch.tensor([0.5, 1.0, 2.0])
    quantizer.restart(levels, scale)
    quantizer.mode = Mode.HARD
    assert torch.equal(quantizer(torch.zeros(3, 4)), torch.tensor([-4.0, 0.0, 0.0, 3.0]) * scale[:, None])
    quantizer.mode = Mode.LEARN
    torch.testing.assert_close(quantizer(torch.zeros(3, 4)), levels.clamp(-4, 3) * scale[:, None])
