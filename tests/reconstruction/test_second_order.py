from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inc_clusterq.reconstruction import second_order
from inc_clusterq.reconstruction.moments import Moments
from inc_clusterq.reconstruction.ranges import signed_levels, weight_scale
from inc_clusterq.reconstruction.second_order import adapted, best_rounding, descend, quadratic, round_columns


def inputs(groups: int, n: int, samples: int = 4000) -> Tensor:
    """Correlated, positive columns, as behind a ReLU; shape (G, n, samples)."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(groups, n, n, generator=generator, dtype=torch.float64)
    return (mixing @ torch.randn(groups, n, samples, generator=generator, dtype=torch.float64)).relu()


def moments(quantized: Tensor, x: Tensor) -> Moments:
    """By the definition, centred before multiplying."""
    m, other = quantized.mean(-1), x.mean(-1)
    a, b = quantized - m[..., None], x - other[..., None]
    count = x.shape[-1]
    return Moments(a @ a.mT / count, a @ b.mT / count, m, other, count)


def rows(groups: int, count: int, n: int) -> Tensor:
    return torch.randn(groups, count, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def output_error(weight: Tensor, x: Tensor, integers: Tensor, scale: Tensor, quantized: Tensor) -> Tensor:
    """Variance of the layer's output error, from the outputs themselves; shape (G, R)."""
    return ((weight @ x) - (integers * scale) @ quantized).var(-1, correction=0)


def test_inputs_without_correlation_ask_for_rounding_to_nearest() -> None:
    target, scale = rows(2, 5, 7), torch.full((2, 5, 1), 0.3, dtype=torch.float64)
    hessian = torch.diag_embed(torch.linspace(1, 4, 7, dtype=torch.float64)).expand(2, 7, 7)
    expected = (target / 0.3).round().clamp(-8, 7)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    assert torch.equal(round_columns(target, upper, scale, -8, 7), expected)
    assert torch.equal(descend(torch.zeros_like(target), target, hessian, scale, -8, 7), expected)


@pytest.mark.parametrize(("groups", "count", "n"), [(6, 1, 9), (1, 8, 20), (2, 4, 70)])  # 70: more than one block
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_output_is_nearer_than_with_rounding_to_nearest(groups: int, count: int, n: int, bits: int) -> None:
    weight, x = rows(groups, count, n), inputs(groups, n)
    integers, scale, _ = best_rounding(weight, moments(x, x), bits)
    lowest, highest = signed_levels(bits)
    assert torch.equal(integers, integers.round().clamp(lowest, highest))
    step = weight_scale(weight.reshape(-1, n), bits, 2.4).reshape(groups, count, 1)
    nearest = (weight / step).round().clamp(lowest, highest)
    found, plain = output_error(weight, x, integers, scale, x), output_error(weight, x, nearest, step, x)
    assert found.mean() < 0.95 * plain.mean()


def test_no_single_integer_could_be_better() -> None:
    x, target, scale = inputs(2, 12), rows(2, 3, 12), torch.full((2, 3, 1), 0.4, dtype=torch.float64)
    hessian = moments(x, x).covariance
    found = descend((target / scale).round().clamp(-2, 1), target, hessian, scale, -2, 1)
    error = quadratic(found * scale - target, hessian)
    for j in range(12):
        for level in range(-2, 2):
            changed = found.clone()
            changed[..., j] = level
            assert (quadratic(changed * scale - target, hessian) >= error - 1e-9).all()


def test_descent_never_raises_the_error() -> None:
    x, target, scale = inputs(1, 80), rows(1, 6, 80), torch.full((1, 6, 1), 0.4, dtype=torch.float64)
    hessian = moments(x, x).covariance
    start = (target / scale).round().clamp(-8, 7)
    found = descend(start, target, hessian, scale, -8, 7)
    assert (quadratic(found * scale - target, hessian) <= quadratic(start * scale - target, hessian)).all()


def test_weights_that_get_their_float_input_stay_as_they_are() -> None:
    x = inputs(3, 9)
    torch.testing.assert_close(adapted(rows(3, 2, 9), moments(x, x)), rows(3, 2, 9))


def test_weights_adapt_to_an_input_that_was_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(second_order, "FEW_SAMPLES", 0.0)
    x, weight = inputs(1, 6), rows(1, 4, 6)
    change = torch.randn(6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = adapted(weight, moments(change @ x + 1, x), pull=0.0)
    torch.testing.assert_close(found @ change, weight)  # w*' (M x) = w' x


def test_weights_adapt_where_the_input_varies_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(second_order, "FEW_SAMPLES", 0.0)
    x = torch.tensor([[[7.0, 7.0, -7.0, -7.0], [1.0, -1.0, 1.0, -1.0]]], dtype=torch.float64)  # variances 49 and 1
    found = adapted(torch.ones(1, 1, 2, dtype=torch.float64), moments(2 * x, x))  # halves would make up for all of it
    pull = 3 * (4 * 49 + 4 * 1) / 2
    expected = torch.tensor([[[(2 * 49 + pull) / (4 * 49 + pull), (2 * 1 + pull) / (4 * 1 + pull)]]], dtype=torch.float64)
    torch.testing.assert_close(found, expected)  # 0.80 and 0.99


def test_with_few_samples_weights_hardly_adapt() -> None:
    x, weight = inputs(1, 40, samples=20), rows(1, 4, 40)
    noisy = x + 0.5 * inputs(1, 40, samples=40)[..., 20:]
    change = (adapted(weight, moments(noisy, x)) - weight).norm() / weight.norm()
    assert change < 0.1


def test_an_input_that_never_varies_is_no_obstacle() -> None:
    x = torch.ones(2, 5, 30, dtype=torch.float64)
    for constant in (x, 0 * x):
        integers, scale, levels = best_rounding(rows(2, 3, 5), moments(constant, constant), 4)
        assert all(torch.isfinite(tensor).all() for tensor in (integers, scale, levels))


def test_moments_that_rounding_errors_have_spoilt_are_damped_until_they_serve() -> None:
    """An eigenvalue below zero by more than the usual damping, as a variance that is lost against the mean leaves it."""
    spoilt, nothing = torch.diag(torch.tensor([1.0, 1.0, -0.5], dtype=torch.float64))[None], torch.zeros(1, 3)
    integers, scale, _ = best_rounding(rows(1, 4, 3), Moments(spoilt, spoilt, nothing, nothing, 100), 4)
    assert bool(integers.isfinite().all())
    assert bool(scale.isfinite().all())
