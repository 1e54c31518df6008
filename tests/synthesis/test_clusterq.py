"""The whole synthesis: shapes, range, balance, determinism, an unchanged model, and that it does what it is for."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from inc_clusterq.errors import ModelError
from inc_clusterq.inputs import InputSpec
from inc_clusterq.synthesis.augmentation import augment
from inc_clusterq.synthesis.clusterq import balanced_labels, synthesise
from inc_clusterq.synthesis.objective import statistics
from inc_clusterq.synthesis.refine import from_unit, random_samples, to_unit
from inc_clusterq.synthesis.settings import ClusterQSettings
from inc_clusterq.synthesis.teacher import teach


def norm_net(shape: tuple[int, ...], classes: int) -> nn.Module:
    """An untrained network for any number of axes, its statistics set at random."""
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    norm = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
    dims, channels = len(shape) - 1, shape[0]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mixes = [nn.Linear(a, b) if dims == 0 else conv[dims](a, b, 3, padding=1) for a, b in ((channels, 6), (6, 8))]
        norms = [norm[dims](c) for c in (6, 8)]
        for layer in norms:
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)

        class Head(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.flatten(2).mean(2) if x.dim() > 2 else x

        return nn.Sequential(mixes[0], norms[0], nn.ReLU(), mixes[1], norms[1], nn.ReLU(), Head(), nn.Linear(8, classes))


@pytest.mark.parametrize(
    ("shape", "classes", "samples"),
    [((5,), 3, 7), ((1, 49), 2, 5), ((1, 8, 8), 10, 13), ((4, 11, 6), 3, 9), ((2, 4, 5, 3), 2, 3), ((3, 9, 9), 50, 6)],
)
def test_any_input_shape_and_fewer_samples_than_classes_work(
    shape: tuple[int, ...], classes: int, samples: int, quick: ClusterQSettings
) -> None:
    spec = InputSpec(shape, -1.0, 3.0, (0.4,), (1.7,))
    x, y = synthesise(norm_net(shape, classes), spec, quick, num_classes=classes, samples=samples, seed=0)
    low, high = spec.bounds(x)
    assert (x.shape, x.dtype, y.shape, y.dtype) == ((samples, *shape), torch.float32, (samples,), torch.int64)
    assert bool(((x >= low) & (x <= high)).all())
    assert not x.requires_grad
    assert len(y.unique()) == min(samples, classes)


@pytest.mark.parametrize("left_out", ["iterations", "refine_iterations"])
def test_each_phase_can_be_left_out(left_out: str, trained: nn.Module, spec: InputSpec, quick: ClusterQSettings) -> None:
    settings = quick.model_copy(update={left_out: 0})
    x, _ = synthesise(trained, spec, settings, num_classes=4, samples=5, seed=0)
    low, high = spec.bounds(x)
    assert bool(((x >= low) & (x <= high)).all())
    assert (x[0] - x[1]).abs().max() > 0.01


def test_a_single_sample_works(trained: nn.Module, spec: InputSpec, quick: ClusterQSettings) -> None:
    x, y = synthesise(trained, spec, quick, num_classes=4, samples=1, seed=0)
    assert (len(x), len(y)) == (1, 1)


def test_one_seed_names_one_result_whatever_the_global_seed(
    trained: nn.Module, spec: InputSpec, quick: ClusterQSettings
) -> None:
    runs = []
    for seed in (1, 1, 2):
        torch.rand(seed + 3)
        before = torch.random.get_rng_state()
        runs.append(synthesise(trained, spec, quick, num_classes=4, samples=9, seed=seed))
        assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][0], runs[2][0])


def test_the_model_comes_back_unchanged(trained: nn.Sequential, spec: InputSpec, quick: ClusterQSettings) -> None:
    trained.train()
    trained[4].eval()
    trained[0].weight.requires_grad_(False)
    before = copy.deepcopy(trained)
    synthesise(trained, spec, quick, num_classes=4, samples=9, seed=0)
    for name, value in trained.state_dict().items():
        assert torch.equal(value, before.state_dict()[name]), name
    assert [m.training for m in trained.modules()] == [m.training for m in before.modules()]
    assert [p.requires_grad for p in trained.parameters()] == [p.requires_grad for p in before.parameters()]
    assert all(p.grad is None for p in trained.parameters())
    for part in trained.modules():
        hooks = part._forward_pre_hooks, part._forward_pre_hooks_with_kwargs, part._forward_hooks, part._backward_hooks
        assert not any(hooks)


def test_any_stretch_of_labels_is_balanced() -> None:
    labels = balanced_labels(torch.arange(5), 23, torch.Generator().manual_seed(0))
    assert len(labels) == 23
    for start in range(0, 20, 5):
        assert labels[start : start + 5].sort().values.tolist() == [0, 1, 2, 3, 4]
    for end in range(1, 23):
        counts = labels[:end].bincount(minlength=5)
        assert counts.max() - counts.min() <= 1
    assert labels[:5].tolist() != labels[5:10].tolist() or labels[:5].tolist() != labels[10:15].tolist()


@pytest.mark.parametrize("generator_steps", [0, 40])
def test_the_set_is_classified_as_wanted_and_has_the_statistics_of_the_training_data(
    generator_steps: int, trained: nn.Module, spec: InputSpec
) -> None:
    settings = ClusterQSettings(
        iterations=generator_steps,
        warmup_iterations=20,
        batch_size=32,
        refine_iterations=80,
        refine_batch=32,
        augmentation="none",  # two of the classes have a direction
    )
    x, y = synthesise(trained, spec, settings, num_classes=4, samples=64, seed=0)
    noise = random_samples(spec, 64, torch.Generator().manual_seed(0))
    with teach(trained, spec, num_classes=4, first_aligned_layer=None) as teacher, torch.no_grad():
        ours, theirs = teacher.observe(x), teacher.observe(noise)
        distances = [statistics(seen.samples, teacher.references, "relative").item() for seen in (ours, theirs)]
    assert (ours.predicted == y).float().mean() > 0.95
    assert distances[0] < 0.1 * distances[1]


def test_refining_lowers_the_distance_to_the_statistics(trained: nn.Module, spec: InputSpec) -> None:
    found = []
    for steps in (0, 40):
        settings = ClusterQSettings(iterations=20, warmup_iterations=10, batch_size=16, refine_iterations=steps)
        x, _ = synthesise(trained, spec, settings, num_classes=4, samples=32, seed=0)
        with teach(trained, spec, num_classes=4, first_aligned_layer=None) as teacher, torch.no_grad():
            found.append(statistics(teacher.observe(x).samples, teacher.references, "relative").item())
    assert found[1] < 0.5 * found[0]


class Recorder:
    """A watcher that remembers."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int]] = []
        self.steps: list[int] = []
        self.notes: list[str] = []

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Recorder]:
        self.stages.append((title, total))
        self.steps.append(0)
        yield self

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.steps[-1] += steps
        self.notes.append(note)

    skip = advance


def test_progress_counts_every_step_of_every_batch(trained: nn.Module, spec: InputSpec, quick: ClusterQSettings) -> None:
    watcher = Recorder()
    synthesise(trained, spec, quick, num_classes=4, samples=17, seed=0, progress=watcher)  # 3 batches of 6, 6, 5
    assert [total for _, total in watcher.stages] == [6, 12]
    assert watcher.steps == [6, 12]
    assert all("statistics" in note for note in watcher.notes)


@pytest.mark.parametrize(("start", "title"), [("leaves", "Refining dead leaves"), ("generator", "Refining synthetic inputs")])
def test_progress_tells_what_is_refined(
    start: str, title: str, trained: nn.Module, spec: InputSpec, quick: ClusterQSettings
) -> None:
    watcher = Recorder()
    settings = quick.model_copy(update={"start": start})
    synthesise(trained, spec, settings, num_classes=4, samples=3, seed=0, progress=watcher)
    assert watcher.stages[-1][0] == title


def test_a_model_without_batch_norm_and_impossible_numbers_are_refused(
    trained: nn.Module, spec: InputSpec, quick: ClusterQSettings
) -> None:
    with pytest.raises(ModelError, match="no BatchNorm"):
        synthesise(nn.Flatten(), spec, quick, num_classes=4, samples=2, seed=0)
    with pytest.raises(ValueError, match="samples is 0"):
        synthesise(trained, spec, quick, num_classes=4, samples=0, seed=0)
    with pytest.raises(ValueError, match="num_classes is 1"):
        synthesise(trained, spec, quick, num_classes=1, samples=2, seed=0)


def test_shares_of_the_range_and_inputs_are_inverse() -> None:
    spec = InputSpec((3, 4, 4), 0.0, 255.0, (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
    unit = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    unit[0], unit[1] = 0, 1
    x = from_unit(unit, spec)
    low, high = spec.bounds(x)
    assert torch.equal(x[0], low.expand(3, 4, 4))
    assert torch.equal(x[1], high.expand(3, 4, 4))
    torch.testing.assert_close(to_unit(x, spec), unit, rtol=0, atol=1e-6)


def test_augmentation_shifts_a_batch_and_flips_single_images() -> None:
    x = torch.arange(2 * 16 * 24, dtype=torch.float32).view(1, 2, 16, 24).repeat(40, 1, 1, 1).requires_grad_()
    rng = torch.Generator().manual_seed(0)
    shifted = augment(x, "shift", rng)
    rolls = [torch.roll(x[0], (i, j), (1, 2)) for i in range(-2, 3) for j in range(-3, 4)]
    assert sum(torch.equal(shifted[0], roll) for roll in rolls) == 1
    assert torch.equal(shifted[0], shifted[39])
    both = augment(x, "shift_flip", rng)
    kinds = {tuple(image.flatten().tolist()) for image in both}
    assert len(kinds) == 2
    both.backward(both.detach())  # what went to a place comes back from there
    assert x.grad is not None
    assert torch.equal(x.grad, x.detach())


def test_only_images_are_augmented() -> None:
    rng = torch.Generator().manual_seed(0)
    for shape in ((4, 5), (4, 1, 50), (4, 1, 8, 8, 8)):
        x = torch.rand(shape, generator=rng)
        assert augment(x, "shift_flip", rng) is x
    image = torch.rand(4, 1, 16, 16, generator=rng)
    assert augment(image, "none", rng) is image


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU to synthesise on")
@pytest.mark.parametrize("keys", [{"start": "generator"}, {"start": "leaves"}, {"synthesizer": "latent"}])
def test_on_a_gpu_one_seed_names_one_result_and_the_model_stays(
    keys: dict[str, str], trained: nn.Sequential, spec: InputSpec, quick: ClusterQSettings
) -> None:
    settings = ClusterQSettings.model_validate({**quick.model_dump(), **keys})
    runs = [synthesise(trained, spec, settings, num_classes=4, samples=9, seed=0)[0] for _ in range(2)]
    assert torch.equal(runs[0], runs[1])
    assert runs[0].device.type == trained[0].weight.device.type == "cpu"
