"""Each measure against a value known by other means, and real inputs against noise on a network that was trained on them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from inc_clusterq.inputs import InputSpec
from inc_clusterq.synthesis.clusterq import synthesise
from inc_clusterq.synthesis.quality import (
    LayerQuality,
    Range,
    cover,
    diversity,
    look,
    measure,
    measure_set,
    nearest_distance,
    project,
    separability,
    variation,
)
from inc_clusterq.synthesis.refine import random_samples
from inc_clusterq.synthesis.settings import ClusterQSettings
from inc_clusterq.synthesis.statistics import sample_moments
from inc_clusterq.synthesis.teacher import teach


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_coverage_and_excess_are_shares_of_the_wanted_range() -> None:
    wanted = Range(torch.tensor([0.0, 0.0, 0.0, 5.0]), torch.tensor([2.0, 1.0, 1.0, 5.0]))
    found = Range(torch.tensor([1.0, -1.0, 3.0, 0.0]), torch.tensor([3.0, 2.0, 4.0, 9.0]))
    # half covered and half as much beyond; all covered and twice as much beyond; nothing and as much; no range at all
    assert cover(found, wanted) == pytest.approx(((0.5 + 1 + 0) / 3, (0.5 + 2 + 1) / 3))
    assert cover(wanted, wanted) == (1, 0)
    single = Range(torch.zeros(2), torch.zeros(2))
    assert cover(found, single) == (1, 0)


@pytest.mark.parametrize("per_class", [4, 40, 400])
def test_separability_is_that_of_the_distribution_whatever_the_number_of_samples(per_class: int) -> None:
    labels = torch.arange(50).repeat(per_class)
    centres = 3 * random(50, 20, seed=1)
    features = centres[labels] + 2 * random(len(labels), 20, seed=2)
    assert separability(features, labels) == pytest.approx(1.5, rel=0.1)


def test_classes_that_do_not_differ_are_not_separated() -> None:
    assert separability(random(2000, 10), torch.arange(2000) % 20) == pytest.approx(0, abs=0.05)
    assert separability(random(3, 4), torch.arange(3)) is None
    assert separability(random(6, 4), torch.zeros(6, dtype=torch.int64)) is None


@pytest.mark.parametrize(("samples", "channels"), [(3000, 8), (3000, 1), (6, 40)])
def test_diversity_counts_the_directions_of_the_spread(samples: int, channels: int) -> None:
    features = random(samples, channels)
    eigenvalues = torch.linalg.eigvalsh(torch.cov(features.T.double()).reshape(channels, channels))
    assert diversity(features) == pytest.approx(float(eigenvalues.sum() ** 2 / eigenvalues.square().sum()))
    assert diversity(features) <= min(samples - 1, channels) + 1e-9
    line = features[:, :1] * torch.ones(1, 7)
    assert diversity(line) == pytest.approx(1)
    assert diversity(torch.ones(5, 3)) == 0
    assert diversity(torch.full((7, 3), 0.1)) == 0  # whose mean is not 0.1 to the last digit


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_variation_is_the_share_of_the_variance_between_samples(shift: float) -> None:
    """Against NumPy's variances, and against what was put in: 9 of 10 parts for a shift of deviation 3."""
    x = random(500, 4, 50) + shift * random(500, 4, 1, seed=1)
    x[:, 3] = 7.0  # a channel without variance has no share of one
    values = x.double().numpy()
    by_hand = (values.mean(2).var(0) / values.var((0, 2)).clip(1e-12))[:3].mean()
    found = variation(sample_moments(x, 500))
    assert found == pytest.approx(by_hand, rel=1e-4)
    assert found == pytest.approx((shift**2 + 1 / 50) / (shift**2 + 1), rel=0.1)
    assert variation(sample_moments(torch.ones(5, 2, 3), 5)) == 0


def test_nearest_neighbours_are_measured_in_shares_of_the_range() -> None:
    spec = InputSpec((1, 2, 2), 0.0, 10.0, (5.0,), (2.0,))
    raw = torch.zeros(4, 1, 2, 2)
    raw[1], raw[2], raw[3] = 1, 3, 9
    assert nearest_distance(spec.normalise(raw), spec) == pytest.approx(0.1)  # of 0.1, 0.1, 0.2, 0.6 the lower median
    assert nearest_distance(spec.normalise(raw[:1]), spec) is None


def test_the_projection_keeps_what_lies_in_a_plane() -> None:
    plane = random(30, 2) * torch.tensor([5.0, 2.0])
    basis = torch.linalg.qr(random(9, 2, seed=3)).Q
    found = project(plane @ basis.T + 7)
    torch.testing.assert_close(torch.pdist(found), torch.pdist(plane), rtol=1e-3, atol=1e-3)
    assert project(random(4, 1)).shape == (4, 2)


def quality(net: nn.Module, inputs: Tensor, labels: Tensor, real: Tensor | None = None) -> tuple[LayerQuality, ...]:
    spec = InputSpec(tuple(inputs.shape[1:]))
    with teach(net, spec, num_classes=4, first_aligned_layer=None) as teacher:
        ranges = [layer.range for layer in look(teacher, real, labels).layers] if real is not None else None
        return measure(look(teacher, inputs, labels), teacher, spec, 1.0, ranges).layers


def test_moments_and_ranges_are_those_of_hooks_set_by_hand(trained: nn.Sequential, real: tuple[Tensor, Tensor]) -> None:
    layers = quality(trained, *real, real[0])
    assert [layer.name for layer in layers] == ["1", "4", "7"]
    assert all((layer.real_coverage, layer.real_excess) == (1, 0) for layer in layers)
    x = trained[0](real[0]).detach()
    norm = trained[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    deviation = (norm.running_var + norm.eps).sqrt()
    mean, spread = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0).add(norm.eps).sqrt()
    by_hand = ((mean - norm.running_mean).square() + (spread - deviation).square()).mean() / deviation.square().mean()
    assert layers[0].statistics_distance == pytest.approx(float(by_hand), rel=1e-4)
    low, high = x.amin((0, 2, 3)), x.amax((0, 2, 3))
    implied = Range(norm.running_mean - 3 * deviation, norm.running_mean + 3 * deviation)
    assert (layers[0].implied_coverage, layers[0].implied_excess) == pytest.approx(cover(Range(low, high), implied))


def test_real_and_synthetic_inputs_are_both_far_better_than_noise(
    trained: nn.Module, real: tuple[Tensor, Tensor], spec: InputSpec
) -> None:
    settings = ClusterQSettings(
        iterations=40, warmup_iterations=20, batch_size=32, refine_iterations=80, refine_batch=64, augmentation="none"
    )
    x, y = synthesise(trained, spec, settings, num_classes=4, samples=200, seed=0)
    noise = random_samples(spec, 200, torch.Generator().manual_seed(0))
    theirs, ours, none = (quality(trained, *pair, real[0])[-1] for pair in (real, (x, y), (noise, y)))
    assert max(theirs.statistics_distance, ours.statistics_distance) < 0.05 * none.statistics_distance
    assert theirs.separability is not None
    assert ours.separability is not None
    assert none.separability is not None
    assert min(theirs.separability, ours.separability) > 5 * none.separability
    assert ours.real_coverage is not None
    assert none.real_coverage is not None
    assert ours.real_coverage > none.real_coverage


def test_a_set_without_classes_has_no_separability(trained: nn.Module, real: tuple[Tensor, Tensor]) -> None:
    layers = quality(trained, real[0], torch.full((200,), -1))
    assert all(layer.separability is None and layer.real_coverage is None for layer in layers)
    assert all(math.isfinite(layer.diversity) for layer in layers)


def test_the_whole_set_is_summed_up_in_one_sentence(trained: nn.Module, real: tuple[Tensor, Tensor], spec: InputSpec) -> None:
    found = measure_set(trained, spec, 4, *real)
    assert found.samples == 200
    assert found.recognised is not None
    assert found.recognised > 0.95
    assert found.mean("diversity") == pytest.approx(sum(layer.diversity for layer in found.layers) / 3)
    assert found.mean("real_coverage") is None
    assert "mean of 3 layers" in found.sentence()
    assert found.mean("statistics_distance") < found.noise_distance / 3  # type: ignore[operator]
    assert "than noise" not in found.sentence()
    assert measure_set(trained, spec, 0, *real).recognised is None


def test_a_set_that_is_no_nearer_than_noise_is_told(trained: nn.Module, spec: InputSpec) -> None:
    noise, labels = random_samples(spec, 64, torch.Generator().manual_seed(0)), torch.zeros(64).long()
    found = measure_set(trained, spec, 4, noise, labels)
    assert found.mean("statistics_distance") == pytest.approx(found.noise_distance)
    told = measure_set(trained, spec, 4, torch.zeros_like(noise), labels).sentence()
    assert told.endswith(
        "It is no nearer to them than noise: check range, mean and std of model.input, and that gradients reach the input."
    )
