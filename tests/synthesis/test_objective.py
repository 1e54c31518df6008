"""Losses against values worked out by hand, and their gradients against what each term is for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from inc_clusterq.inputs import InputSpec
from inc_clusterq.synthesis.centroids import Centroids, moved, unseen
from inc_clusterq.synthesis.objective import (
    alignment,
    classification,
    distance,
    draw_diversity,
    evaluate,
    statistics,
)
from inc_clusterq.synthesis.settings import ClusterQSettings, Distance
from inc_clusterq.synthesis.statistics import Moments, Reference, class_moments
from inc_clusterq.synthesis.teacher import Teacher, teach


def moments(mean: list[float], variance: list[float]) -> Moments:
    return Moments(torch.tensor(mean), torch.tensor(variance))


LAYER = Reference(moments([1.0, 3.0], [4.0, 16.0]), 0.0)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("variance", (1 + 9 + (9 - 4) ** 2 + 0) / 2),
        ("deviation", (1 + 9 + (3 - 2) ** 2 + 0) / 2),
        ("relative", (1 + 9 + (3 - 2) ** 2 + 0) / 2 / 10),  # mean running variance: 10
    ],
)
def test_distance_has_its_hand_value(kind: Distance, value: float) -> None:
    found = distance(moments([2.0, 0.0], [9.0, 16.0]), LAYER.moments, LAYER, kind)
    assert found.item() == pytest.approx(value)


@pytest.mark.parametrize("kind", ["variance", "deviation", "relative"])
def test_distance_is_zero_at_the_target_and_finite_for_constant_channels(kind: Distance) -> None:
    assert distance(LAYER.moments, LAYER.moments, LAYER, kind).item() == 0
    layer = Reference(moments([0.0], [0.0]), 1e-5)
    variance = torch.zeros(1, requires_grad=True)
    distance(Moments(torch.ones(1), variance), moments([0.0], [1.0]), layer, kind).backward()
    assert variance.grad is not None
    assert variance.grad.isfinite().all()


def test_the_relative_distance_does_not_depend_on_the_scale_of_a_layer() -> None:
    def scaled(m: Moments, factor: float) -> Moments:
        return Moments(m.mean * factor, m.variance * factor**2)

    near = moments([2.0, 1.0], [9.0, 12.0])
    far = distance(scaled(near, 50), scaled(LAYER.moments, 50), Reference(scaled(LAYER.moments, 50), 0.0), "relative")
    torch.testing.assert_close(far, distance(near, LAYER.moments, LAYER, "relative"))


def test_classification_has_its_hand_value() -> None:
    assert classification(torch.zeros(3, 4), torch.tensor([0, 1, 3])).item() == pytest.approx(1.386294)


def features(teacher: Teacher, x: Tensor) -> tuple[Moments, ...]:
    return teacher.observe(x).samples


@pytest.fixture
def known(trained: nn.Module, spec: InputSpec, real: tuple[Tensor, Tensor]) -> Centroids:
    """Centroids of the real classes, at all three layers."""
    with teach(trained, spec, num_classes=4, first_aligned_layer=0) as teacher, torch.no_grad():
        seen = teacher.observe(real[0])
    return moved(unseen(torch.arange(4), teacher.references), seen.samples, real[1], seen.predicted, 1.0)


def silent_noise(centroids: Centroids) -> list[Moments]:
    return [Moments(layer.mean * 0, layer.variance * 0) for layer in centroids.layers]


def test_alignment_equals_a_plain_loop_over_classes_and_layers(known: Centroids) -> None:
    rng = torch.Generator().manual_seed(0)
    samples = [
        Moments(torch.randn(5, layer.mean.shape[1], generator=rng), torch.rand(5, layer.mean.shape[1], generator=rng))
        for layer in known.layers
    ]
    references = [Reference(Moments(layer.mean[0], layer.variance[0]), 1e-5) for layer in known.layers]
    noise = draw_diversity(rng, references, 4, 0.03, 0.05)
    labels = torch.tensor([1, 3, 1, 1, 3])
    wanted = []
    for label in (1, 3):
        for layer, batch, shift, reference in zip(known.layers, samples, noise, references, strict=True):
            mean = batch.mean[labels == label].mean(0)
            variance = (batch.variance[labels == label] + (batch.mean[labels == label] - mean) ** 2).mean(0)
            target = Moments(layer.mean[label] + shift.mean[label], layer.variance[label] + shift.variance[label])
            wanted.append(distance(Moments(mean, variance), target, reference, "relative"))
    found = alignment(samples, labels, known, noise, references, "relative")
    torch.testing.assert_close(found, torch.stack(wanted).mean())


def test_every_aligned_layer_adds_to_the_loss_and_to_the_gradient(known: Centroids) -> None:
    batch = [Moments(layer.mean.clone(), layer.variance.clone()) for layer in known.layers]
    references = [Reference(Moments(layer.mean[0], layer.variance[0]), 1e-5) for layer in known.layers]
    labels = torch.arange(4)
    assert alignment(batch, labels, known, silent_noise(known), references, "relative").item() == pytest.approx(0, abs=1e-9)
    for layer in range(len(batch)):
        off = [Moments(m.mean + (i == layer), m.variance) for i, m in enumerate(batch)]
        for m in off:
            m.mean.requires_grad_()
        loss = alignment(off, labels, known, silent_noise(known), references, "relative")
        loss.backward()
        assert loss.item() > 1e-3
        grads = [m.mean.grad for m in off]
        assert [grad is not None and bool(grad.abs().max() > 1e-5) for grad in grads] == [i == layer for i in range(3)]


@pytest.mark.parametrize("own", [0, 3])
def test_alignment_moves_a_class_towards_its_own_centroid_and_not_another(
    own: int, known: Centroids, trained: nn.Module, spec: InputSpec, real: tuple[Tensor, Tensor]
) -> None:
    other = (own + 1) % 4
    x = real[0][real[1] == other][:16].clone().requires_grad_()  # looks like another class, is to become its own
    labels = torch.full((16,), own)

    def gap(teacher: Teacher, centre: int) -> float:
        with torch.no_grad():
            found, _ = class_moments(features(teacher, x)[-1], labels * 0, 1)
        return float((found.mean[0] - known.layers[-1].mean[centre]).norm())

    with teach(trained, spec, num_classes=4, first_aligned_layer=0) as teacher:
        before = gap(teacher, own), gap(teacher, other)
        optimiser = torch.optim.Adam([x], 0.05)
        for _ in range(30):
            loss = alignment(features(teacher, x), labels, known, silent_noise(known), teacher.references, "relative")
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        after = gap(teacher, own), gap(teacher, other)
        with torch.no_grad():
            predicted = teacher.observe(x).predicted
    assert after[0] < 0.5 * before[0]
    assert after[1] > before[1]
    assert (predicted == own).float().mean() > 0.8


def test_diversity_noise_changes_the_gradient_and_has_the_scale_asked_for() -> None:
    references = [Reference(moments([0.0] * 2000, [4.0] * 2000), 1e-5)]
    rng = torch.Generator().manual_seed(0)
    (noise,) = draw_diversity(rng, references, 5, 0.03, 0.05)
    assert noise.mean.std().item() == pytest.approx(0.03 * 2, rel=0.05)
    assert noise.variance.std().item() == pytest.approx(0.05 * 4, rel=0.05)

    label = torch.tensor([0])
    batch = Moments(torch.ones(1, 2000), torch.ones(1, 2000))
    centre = moved(unseen(label, references), [batch], label, label, 1.0)
    grads = []
    for shift in draw_diversity(rng, references * 2, 1, 0.03, 0.05):
        x = batch.mean.clone().requires_grad_()
        alignment([Moments(x, batch.variance)], label, centre, [shift], references, "relative").backward()
        assert x.grad is not None
        grads.append(x.grad)
    assert grads[0].abs().min() > 0
    assert not torch.equal(grads[0], grads[1])


def test_classes_that_were_never_seen_are_not_aligned(known: Centroids) -> None:
    references = [Reference(Moments(layer.mean[0], layer.variance[0]), 1e-5) for layer in known.layers]
    batch = [Moments(layer.mean[:2] + 1, layer.variance[:2]) for layer in known.layers]
    only_first = Centroids(known.classes, known.layers, torch.tensor([True, False, False, False]))
    labels = torch.tensor([0, 1])
    alone = alignment(
        [Moments(m.mean[:1], m.variance[:1]) for m in batch], labels[:1], known, silent_noise(known), references, "relative"
    )
    torch.testing.assert_close(alignment(batch, labels, only_first, silent_noise(known), references, "relative"), alone)
    nothing = unseen(known.classes, references)
    assert alignment(batch, labels, nothing, silent_noise(known), references, "relative").item() == 0


def test_a_single_feature_vector_is_aligned_by_its_mean_alone() -> None:
    references = [Reference(moments([0.0, 0.0], [1.0, 1.0]), 1e-5)]
    centre = Centroids(torch.tensor([0]), (moments([0.0, 0.0], [5.0, 5.0]),), torch.tensor([True]))
    centre = Centroids(centre.classes, (Moments(centre.layers[0].mean[None], centre.layers[0].variance[None]),), centre.seen)
    one = [Moments(torch.tensor([[2.0, 0.0]]), torch.zeros(1, 2))]
    found = alignment(one, torch.tensor([0]), centre, silent_noise(centre), references, "deviation")
    assert found.item() == pytest.approx((4 + 0) / 2)


def test_statistics_average_over_all_layers_and_total_is_the_weighted_sum(
    trained: nn.Module, spec: InputSpec, real: tuple[Tensor, Tensor], known: Centroids
) -> None:
    settings = ClusterQSettings(classification_weight=2, statistics_weight=3, alignment_weight=5, prior_weight=7)
    with teach(trained, spec, num_classes=4, first_aligned_layer=0) as teacher, torch.no_grad():
        seen = teacher.observe(real[0])
        losses = evaluate(real[0], seen, real[1], teacher, spec, settings, known, silent_noise(known))
        before = evaluate(real[0], seen, real[1], teacher, spec, settings, None, [])
    single = [statistics([s], [r], "relative") for s, r in zip(seen.samples, teacher.references, strict=True)]
    torch.testing.assert_close(losses.statistics, torch.stack(single).mean())
    parts = 2 * losses.classification + 3 * losses.statistics + 5 * losses.alignment + 7 * losses.prior
    torch.testing.assert_close(losses.total(settings), parts)
    assert before.alignment.item() == 0
    assert "statistics" in losses.note()
