"""Moments against plain loops, capture against hooks set by hand, the model unharmed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from inc_clusterq.errors import ModelError
from inc_clusterq.synthesis.statistics import (
    Moments,
    average,
    batch_moments,
    batch_norms,
    capture_inputs,
    class_moments,
    reference,
    sample_moments,
)

SHAPES = [(6, 3), (6, 3, 11), (6, 3, 5, 4), (6, 3, 2, 3, 4)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
def test_moments_of_a_batch_are_those_of_all_its_values_in_a_channel(shape: tuple[int, ...]) -> None:
    x = random(*shape)
    moments = batch_moments(sample_moments(x, len(x)))
    for channel in range(shape[1]):
        values = x[:, channel].flatten()
        torch.testing.assert_close(moments.mean[channel], values.mean())
        torch.testing.assert_close(moments.variance[channel], values.var(correction=0))


def test_moments_with_channels_last_are_those_of_the_same_values_and_so_is_their_gradient() -> None:
    x = random(6, 3, 5, 4)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        values = x.clone(memory_format=layout).requires_grad_()
        moments = sample_moments(values, 6)
        (gradient,) = torch.autograd.grad((moments.mean * moments.variance.exp()).sum(), values)
        found.append((moments.mean, moments.variance, gradient))
    torch.testing.assert_close(found[0], found[1])
    assert found[1][2].is_contiguous(memory_format=torch.channels_last)  # or layers before would change it back


@pytest.mark.parametrize("shape", SHAPES)
def test_moments_of_a_class_equal_a_plain_loop_over_classes(shape: tuple[int, ...]) -> None:
    x = random(*shape)
    index = torch.tensor([2, 0, 2, 2, 0, 3])
    counted = torch.tensor([True, True, False, True, True, False])
    for mask in (None, counted):
        moments, counts = class_moments(sample_moments(x, len(x)), index, 4, mask)
        for wanted in range(4):
            rows = (index == wanted) if mask is None else (index == wanted) & mask
            assert counts[wanted] == rows.sum()
            for channel in range(shape[1]):
                values = x[rows, channel].flatten()
                mean, variance = (values.mean(), values.var(correction=0)) if len(values) else (x.new_zeros(()),) * 2
                torch.testing.assert_close(moments.mean[wanted, channel], mean)
                torch.testing.assert_close(moments.variance[wanted, channel], variance)


def test_gradient_of_the_moments_is_the_numerical_one() -> None:
    x = random(3, 2, 4).requires_grad_()

    def both(values: Tensor) -> tuple[Tensor, Tensor]:
        moments = sample_moments(values, 3)
        return moments.mean, moments.variance

    assert torch.autograd.gradcheck(both, x)


def test_variance_keeps_its_digits_beside_a_large_mean() -> None:
    x = 1e4 + torch.randn(4, 2, 500, generator=torch.Generator().manual_seed(1))
    wanted = x.double().var(-1, correction=0)
    torch.testing.assert_close(sample_moments(x, 4).variance.double(), wanted, rtol=1e-3, atol=0)


def test_rows_that_a_model_folds_into_the_batch_belong_to_their_sample() -> None:
    x = random(2, 3, 5, 4)  # two samples of three frames
    folded = sample_moments(x.flatten(0, 1), 2)
    unfolded = sample_moments(x.transpose(1, 2), 2)
    torch.testing.assert_close(folded.mean, unfolded.mean)
    torch.testing.assert_close(folded.variance, unfolded.variance)
    with pytest.raises(ModelError, match="6 rows for 4 inputs"):
        sample_moments(x.flatten(0, 1), 4)


def test_capture_sees_what_hooks_set_by_hand_see(trained: nn.Module, real: tuple[Tensor, Tensor]) -> None:
    layers = batch_norms(trained)
    assert [type(layer) for layer in layers] == [nn.BatchNorm2d] * 3
    by_hand: list[Tensor] = []
    handles = [layer.register_forward_hook(lambda _, args, __: by_hand.append(args[0].clone())) for layer in layers]
    trained(real[0])
    for handle in handles:
        handle.remove()
    with capture_inputs(layers, torch.clone) as captured:
        trained(real[0])
    assert list(captured) == layers
    for layer, seen in zip(layers, by_hand, strict=True):
        torch.testing.assert_close(captured[layer], [seen], rtol=0, atol=0)
    assert not any(layer._forward_pre_hooks or layer._forward_pre_hooks_with_kwargs for layer in layers)


def test_hooks_go_away_when_the_forward_fails(trained: nn.Module) -> None:
    layers = batch_norms(trained)
    with pytest.raises(RuntimeError), capture_inputs(layers, torch.clone):
        trained(torch.zeros(1, 5, 9, 7))
    assert not any(layer._forward_pre_hooks for layer in layers)


def test_a_shared_layer_is_listed_once_and_captured_at_each_call() -> None:
    norm = nn.BatchNorm1d(3)
    net = nn.Sequential(nn.Linear(3, 3), norm, nn.ReLU(), norm).eval()
    assert batch_norms(net) == [norm]
    with capture_inputs([norm], lambda x: sample_moments(x, 4)) as captured:
        net(torch.ones(4, 3))
    assert len(captured[norm]) == 2
    mixed = average([Moments(torch.tensor([1.0]), torch.tensor([2.0])), Moments(torch.tensor([3.0]), torch.tensor([6.0]))])
    assert (mixed.mean.item(), mixed.variance.item()) == (2.0, 4.0)


def test_frozen_batch_norm_of_other_libraries_counts() -> None:
    class FrozenBatchNorm2d(nn.Module):
        running_mean: Tensor
        running_var: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.eps = 1e-4
            self.register_buffer("running_mean", torch.tensor([1.0, 2.0]))
            self.register_buffer("running_var", torch.tensor([3.0, 4.0]))

    layer = FrozenBatchNorm2d()
    assert batch_norms(nn.Sequential(layer, nn.BatchNorm2d(2, track_running_stats=False))) == [layer]
    found = reference(layer)
    assert (found.moments.mean.tolist(), found.moments.variance.tolist(), found.eps) == ([1, 2], [3, 4], 1e-4)


def test_a_model_without_batch_norm_is_told_what_to_do_instead() -> None:
    with pytest.raises(ModelError, match=r"no BatchNorm layer.*real inputs, labelled or not.*StaticQuantConfig"):
        batch_norms(nn.Sequential(nn.Conv2d(1, 1, 1), nn.InstanceNorm2d(1, track_running_stats=True)))


def test_moments_are_not_taken_in_bfloat16_where_the_network_is() -> None:
    x = 5 + random(4, 3, 400).float()
    with torch.autocast("cpu", torch.bfloat16):
        moments = sample_moments(x, len(x))
    torch.testing.assert_close(moments.variance, x.var(-1, correction=0))


def test_running_statistics_may_be_parameters() -> None:
    layer = nn.BatchNorm2d(2)
    del layer.running_mean
    layer.running_mean = nn.Parameter(torch.tensor([1.0, 2.0]))
    assert batch_norms(layer) == [layer]
    assert reference(layer).moments.mean.tolist() == [1, 2]
    assert not reference(layer).moments.mean.requires_grad
