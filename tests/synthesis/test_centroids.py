"""Centroids are per class, move by d, and listen only to samples that the teacher assigns to their class."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from inc_clusterq.inputs import InputSpec
from inc_clusterq.progress import SILENT
from inc_clusterq.synthesis.centroids import Centroids, moved, unseen
from inc_clusterq.synthesis.clusterq import start_centroids, train
from inc_clusterq.synthesis.draft import Draft
from inc_clusterq.synthesis.generator import build_generator
from inc_clusterq.synthesis.settings import ClusterQSettings
from inc_clusterq.synthesis.statistics import Moments, Reference
from inc_clusterq.synthesis.teacher import teach

LAYER = Reference(Moments(torch.zeros(2), torch.ones(2)), 0.0)


def flat(values: list[list[float]]) -> list[Moments]:
    """One layer whose samples have these means and no variance of their own."""
    mean = torch.tensor(values)
    return [Moments(mean, torch.zeros_like(mean))]


def test_a_class_starts_from_its_first_samples_and_then_moves_by_d() -> None:
    start = unseen(torch.tensor([3, 8]), [LAYER])
    assert not start.seen.any()
    labels = torch.tensor([8, 8])
    first = moved(start, flat([[1.0, 2.0], [3.0, 2.0]]), labels, labels, 0.2)
    assert first.seen.tolist() == [False, True]
    assert first.layers[0].mean.tolist() == [[0, 0], [2, 2]]
    assert first.layers[0].variance.tolist() == [[0, 0], [1, 0]]
    second = moved(first, flat([[12.0, 2.0], [12.0, 2.0]]), labels, labels, 0.2)
    torch.testing.assert_close(second.layers[0].mean, torch.tensor([[0.0, 0.0], [4.0, 2.0]]))
    torch.testing.assert_close(second.layers[0].variance, torch.tensor([[0.0, 0.0], [0.8, 0.0]]))


def test_wrongly_predicted_samples_do_not_move_a_centroid() -> None:
    labels = torch.tensor([0, 0, 1])
    start = moved(unseen(torch.tensor([0, 1]), [LAYER]), flat([[1.0, 1.0]] * 3), labels, labels, 0.2)
    after = moved(start, flat([[6.0, 6.0], [99.0, 99.0], [99.0, 99.0]]), labels, torch.tensor([0, 1, 0]), 0.2)
    torch.testing.assert_close(after.layers[0].mean, torch.tensor([[2.0, 2.0], [1.0, 1.0]]))


def test_a_class_that_is_never_recognised_stays_unseen() -> None:
    after = moved(unseen(torch.tensor([0, 1]), [LAYER]), flat([[5.0, 5.0]]), torch.tensor([1]), torch.tensor([0]), 0.2)
    assert not after.seen.any()
    assert after.layers[0].mean.tolist() == [[0, 0], [0, 0]]


def test_centroids_carry_no_gradient() -> None:
    mean = torch.ones(1, 2, requires_grad=True)
    label = torch.tensor([0])
    after = moved(unseen(torch.tensor([0]), [LAYER]), [Moments(mean, mean * 0)], label, label, 0.2)
    assert not after.layers[0].mean.requires_grad


@pytest.fixture
def learned(trained: nn.Module, spec: InputSpec) -> Centroids:
    settings = ClusterQSettings(
        iterations=80, warmup_iterations=40, batch_size=32, classification_weight=0.1, augmentation="none"
    ).of_inputs(spec.shape)
    rng = torch.Generator().manual_seed(0)
    with teach(trained, spec, num_classes=4, first_aligned_layer=0) as teacher:
        generator = build_generator(spec, 4, settings.latent_size, rng, teacher.device)
        return train(generator, teacher, spec, settings, torch.arange(4), rng, SILENT, Draft())


def test_different_classes_have_different_centroids(learned: Centroids) -> None:
    assert learned.seen.all()
    for layer in learned.layers:
        for one in range(4):
            for other in range(one):
                assert (layer.mean[one] - layer.mean[other]).abs().max() > 1e-2
                assert (layer.variance[one] - layer.variance[other]).abs().max() > 1e-3


def test_centroids_of_synthetic_classes_resemble_those_of_real_ones(
    learned: Centroids, trained: nn.Module, spec: InputSpec, real: tuple[Tensor, Tensor]
) -> None:
    with teach(trained, spec, num_classes=4, first_aligned_layer=0) as teacher, torch.no_grad():
        seen = teacher.observe(real[0])
    wanted = moved(unseen(torch.arange(4), teacher.references), seen.samples, real[1], seen.predicted, 1.0)
    # At the last layer: nearest real centroid, each seen from the middle of all classes.
    ours, theirs = (c.layers[-1].mean - c.layers[-1].mean.mean(0) for c in (learned, wanted))
    nearest = nn.functional.cosine_similarity(ours[:, None], theirs[None], dim=2).argmax(1)
    assert nearest.tolist() == [0, 1, 2, 3]


def test_the_start_uses_every_class_and_several_batches(trained: nn.Module, spec: InputSpec) -> None:
    settings = ClusterQSettings(batch_size=3, centroid_samples=4)
    rng = torch.Generator().manual_seed(0)
    with teach(trained, spec, num_classes=4, first_aligned_layer=0) as teacher:
        generator = build_generator(spec, 4, settings.latent_size, rng, teacher.device)
        sizes: list[int] = []
        handle = trained.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
        start_centroids(generator, teacher, settings, unseen(torch.arange(4), teacher.references), rng)
        handle.remove()
    assert sizes == [3, 3, 3, 3, 3, 1]
    assert generator.training
