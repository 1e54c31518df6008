"""The synthesizer `latent`: what the set is for, alignment within it, and convolutions that swing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

import inc_clusterq.synthesis.draft as draft_module
from inc_clusterq.inputs import InputSpec
from inc_clusterq.progress import NO_STAGE
from inc_clusterq.synthesis.batches import Batch
from inc_clusterq.synthesis.centroids import moved, unseen
from inc_clusterq.synthesis.clusterq import synthesise, synthesise_into
from inc_clusterq.synthesis.draft import FolderDraft
from inc_clusterq.synthesis.latent import solve
from inc_clusterq.synthesis.objective import statistics
from inc_clusterq.synthesis.refine import random_samples
from inc_clusterq.synthesis.settings import ClusterQSettings
from inc_clusterq.synthesis.statistics import class_moments
from inc_clusterq.synthesis.swing import swing, swinging
from inc_clusterq.synthesis.teacher import teach

LATENT = ClusterQSettings(synthesizer="latent", refine_iterations=80, refine_batch=32, augmentation="none", swing=False)


def test_the_set_is_classified_as_wanted_and_has_the_statistics_of_the_training_data(
    trained: nn.Module, spec: InputSpec
) -> None:
    settings = LATENT.model_copy(update={"refine_iterations": 200, "classification_weight": 0.05})
    x, y = synthesise(trained, spec, settings, num_classes=4, samples=64, seed=0)
    low, high = spec.bounds(x)
    assert bool(((x >= low) & (x <= high)).all())
    noise = random_samples(spec, 64, torch.Generator().manual_seed(0))
    with teach(trained, spec, num_classes=4, first_aligned_layer=None) as teacher, torch.no_grad():
        ours, theirs = teacher.observe(x), teacher.observe(noise)
        distances = [statistics(seen.samples, teacher.references, "relative").item() for seen in (ours, theirs)]
    assert (ours.predicted == y).float().mean() > 0.9
    assert distances[0] < 0.1 * distances[1]


def test_a_seed_names_one_result_and_batches_differ(trained: nn.Module, spec: InputSpec) -> None:
    few = LATENT.model_copy(update={"refine_iterations": 3, "swing": True, "augmentation": "shift_flip"})
    state = torch.random.get_rng_state()
    runs = [synthesise(trained, spec, few, num_classes=4, samples=40, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(runs[0][0], runs[1][0])
    assert not torch.equal(runs[0][0], runs[2][0])
    assert not torch.equal(runs[0][0][:20], runs[0][0][20:])


@pytest.mark.parametrize(("shape", "samples"), [((5,), 1), ((1, 49), 3), ((1, 49, 10), 33), ((2, 4, 5, 3), 1)])
def test_any_shape_and_a_single_sample_work(shape: tuple[int, ...], samples: int) -> None:
    dims = len(shape) - 1
    norms = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
    net = nn.Sequential(norms[dims](shape[0]), nn.Flatten(), nn.Linear(torch.Size(shape).numel(), 3))
    few = LATENT.model_copy(update={"refine_iterations": 2})
    x, y = synthesise(net, InputSpec(shape), few, num_classes=3, samples=samples, seed=0)
    assert (x.shape, y.shape) == ((samples, *shape), (samples,))
    assert not x.requires_grad


def test_alignment_moves_the_classes_towards_their_own_centroids(
    trained: nn.Module, spec: InputSpec, real: tuple[Tensor, Tensor]
) -> None:
    labels = torch.arange(4).repeat(8)
    with teach(trained, spec, num_classes=4, first_aligned_layer=0) as teacher:
        with torch.no_grad():
            seen = teacher.observe(real[0])
        centroids = moved(unseen(torch.arange(4), teacher.references), seen.samples, real[1], seen.predicted, 0.2)
        still = tuple(type(layer)(layer.mean * 0, layer.variance * 0) for layer in centroids.layers)
        apart = []
        for weight in (0.0, 1.0):
            settings = LATENT.model_copy(update={"alignment_weight": weight, "first_aligned_layer": 0}).of_inputs(spec.shape)
            batch = Batch(slice(0, 32), labels, centroids, still)
            x = solve(batch, teacher, spec, settings, torch.Generator().manual_seed(0), NO_STAGE)
            with torch.no_grad():
                found, _ = class_moments(teacher.observe(x).samples[-1], labels, 4)
            apart.append(float((found.mean - centroids.layers[-1].mean).square().mean()))
    assert apart[1] < 0.5 * apart[0]


def test_a_killed_set_continues_to_the_same_bits(
    trained: nn.Module, spec: InputSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = LATENT.model_copy(update={"refine_iterations": 3, "swing": True, "refine_batch": 8})
    wanted, _ = synthesise(trained, spec, few, num_classes=4, samples=20, seed=0)

    class Killed(Exception):  # noqa: N818 not an error of ours
        pass

    def add(self: FolderDraft, *args: object) -> None:
        if len(self.shards) == 2:
            raise Killed
        original(self, *args)

    original: Callable[..., None] = FolderDraft.add
    monkeypatch.setattr(draft_module.FolderDraft, "add", add)
    with pytest.raises(Killed):
        synthesise_into(FolderDraft(tmp_path / "draft"), trained, spec, few, num_classes=4, samples=20, seed=0)
    monkeypatch.undo()
    draft = FolderDraft(tmp_path / "draft")
    assert len(draft.shards) == 2
    synthesise_into(draft, trained, spec, few, num_classes=4, samples=20, seed=0)
    assert torch.equal(torch.cat([x for x, _ in draft.shards]), wanted)


def test_latents_need_steps() -> None:
    with pytest.raises(ValidationError, match="give it at least 1"):
        ClusterQSettings(synthesizer="latent", refine_iterations=0)


@pytest.mark.parametrize("stride", [2, 3])
def test_what_swings_is_shifted_and_reflected_and_keeps_its_size(stride: int) -> None:
    x = torch.arange(63.0).view(1, 1, 7, 9)
    rng = torch.Generator().manual_seed(0)
    found = {tuple(swing(x, (stride, stride), rng).flatten().tolist()) for _ in range(300)}
    margin = stride - 1
    rows, columns = (nn.functional.pad(torch.arange(float(n))[None], (margin, margin), mode="reflect")[0] for n in (7, 9))
    expected = {
        tuple((9 * rows[i : i + 7, None] + columns[None, j : j + 9]).flatten().tolist())
        for i in range(2 * margin + 1)
        for j in range(2 * margin + 1)
    }
    assert found == expected


def test_axes_without_stride_and_axes_of_one_value_do_not_swing() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 1, 8)
    assert swing(x, (1, 1), rng) is x
    assert all(torch.equal(swing(x, (2, 1), rng), x) for _ in range(5))
    assert {tuple(swing(x, (2, 2), rng).shape) for _ in range(5)} == {(2, 3, 1, 8)}


def test_only_strided_convolutions_swing_and_only_inside_the_context() -> None:
    still, strided = nn.Conv2d(1, 1, 3, padding=1), nn.Conv1d(1, 1, 3, stride=2)
    x, signal = torch.rand(1, 1, 8, 8), torch.rand(1, 1, 9)
    with torch.no_grad():
        plain = strided(signal)
        with swinging(nn.ModuleList([still, strided]), torch.Generator().manual_seed(0)):
            assert torch.equal(still(x), still(x))
            outputs = [strided(signal) for _ in range(20)] + [strided(input=signal) for _ in range(20)]
            assert len({tuple(output.flatten().tolist()) for output in outputs}) == 3
        with swinging(strided, torch.Generator(), wanted=False):
            assert torch.equal(strided(signal), plain)
        assert torch.equal(strided(signal), plain)
