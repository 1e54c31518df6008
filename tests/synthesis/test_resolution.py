"""Most steps at half the size: where that is done, and that nothing but time is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from inc_clusterq.inputs import InputSpec
from inc_clusterq.synthesis import refine
from inc_clusterq.synthesis.clusterq import synthesise, synthesise_into
from inc_clusterq.synthesis.draft import FolderDraft
from inc_clusterq.synthesis.objective import statistics
from inc_clusterq.synthesis.refine import random_samples
from inc_clusterq.synthesis.resolution import enlarge, half_size
from inc_clusterq.synthesis.settings import ClusterQSettings
from inc_clusterq.synthesis.teacher import teach

SPEC = InputSpec((3, 97, 130), 0.0, 255.0, (120.0, 110.0, 100.0), (60.0,))


class Sizes(nn.Module):
    """A small classifier that remembers the sizes of its inputs; its statistics are those of smooth dark images."""

    def __init__(self, pooled: bool = True) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 6, 3, 2, 1)
            self.head = nn.Linear(6 if pooled else 6 * 49 * 65, 4)
        self.norm = nn.BatchNorm2d(6, momentum=None)
        self.pooled = pooled
        self.seen: list[tuple[int, ...]] = []
        with torch.no_grad():
            rough = torch.rand(32, 3, 13, 17, generator=torch.Generator().manual_seed(1)) * 0.5
            low, high = SPEC.bounds(rough)
            self.train()(torch.lerp(low, high, nn.functional.interpolate(rough, SPEC.shape[1:], mode="bilinear")))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(tuple(x.shape[2:]))
        h = torch.relu(self.norm(self.conv(x)))
        result: Tensor = self.head(h.mean((2, 3)) if self.pooled else h.flatten(1))
        return result


def settings(**keys: object) -> ClusterQSettings:
    work = {"iterations": 4, "warmup_iterations": 2, "batch_size": 4, "refine_iterations": 10, "refine_batch": 4}
    return ClusterQSettings.model_validate({**work, **keys})


def sizes(net: Sizes, share: float, start: str = "generator") -> list[tuple[int, ...]]:
    """Sizes of the inputs of each step of generator and refinement."""
    net.seen.clear()
    x, _ = synthesise(net, SPEC, settings(coarse_share=share, start=start), num_classes=4, samples=4, seed=0)
    low, high = SPEC.bounds(x)
    assert x.shape == (4, *SPEC.shape)
    assert bool(((x >= low) & (x <= high)).all())
    return net.seen


def test_the_generator_and_a_share_of_the_refinement_run_at_half_the_size() -> None:
    seen = sizes(Sizes(), 0.7)
    assert set(seen) == {(97, 130), (49, 65)}
    # opening the teacher at the full size, and with channels last; 3 last steps and the look at the finished batch
    assert seen.count((97, 130)) == 2 + 3 + 1


def test_leaves_are_as_small_as_the_first_steps_and_train_no_generator() -> None:
    seen = sizes(Sizes(), 0.7, start="leaves")
    assert seen.count((97, 130)) == 2 + 3 + 1
    assert seen.count((49, 65)) == 1 + 7  # the question whether the model takes this size, and the steps


def test_a_share_of_zero_keeps_every_step_at_the_full_size() -> None:
    assert set(sizes(Sizes(), 0.0)) == {(97, 130)}


def test_a_model_of_one_size_is_served_at_that_size() -> None:
    net = Sizes(pooled=False)
    refused = [size for size in sizes(net, 0.7) if size != (97, 130)]
    assert refused == [(49, 65)]  # the question, once


def test_a_model_may_refuse_another_size_by_any_exception() -> None:
    class Fussy(Sizes):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[2:] != (97, 130):
                raise KeyError(x.shape)
            return super().forward(x)

    with teach(Fussy(), SPEC, num_classes=4, first_aligned_layer=None) as teacher:
        assert half_size(teacher, SPEC) is None


@pytest.mark.parametrize("shape", [(3, 95, 200), (3, 200, 95), (1, 49), (100,), (1, 100, 100, 100)])
def test_small_images_and_what_is_no_image_are_not_halved(shape: tuple[int, ...]) -> None:
    net = Sizes()
    with teach(net, SPEC, num_classes=4, first_aligned_layer=None) as teacher:
        assert half_size(teacher, InputSpec(shape)) is None
        assert half_size(teacher, SPEC) == InputSpec((3, 49, 65), 0.0, 255.0, (120.0, 110.0, 100.0), (60.0,))


@pytest.mark.parametrize("start", ["generator", "leaves"])
def test_a_killed_set_continues_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str) -> None:
    net, few = Sizes(), settings(start=start, coarse_share=0.5, refine_iterations=2)
    wanted, _ = synthesise(net, SPEC, few, num_classes=4, samples=7, seed=0)

    class Killed(Exception):  # noqa: N818 not an error of ours
        pass

    def enlarge_once(x: Tensor, spec: InputSpec) -> Tensor:
        if len(draft.shards) == 1:
            raise Killed
        return enlarge(x, spec)

    draft = FolderDraft(tmp_path / "draft")
    monkeypatch.setattr(refine, "enlarge", enlarge_once)
    with pytest.raises(Killed):
        synthesise_into(draft, net, SPEC, few, num_classes=4, samples=7, seed=0)
    monkeypatch.undo()
    draft = FolderDraft(tmp_path / "draft")
    assert len(draft.shards) == 1
    synthesise_into(draft, net, SPEC, few, num_classes=4, samples=7, seed=0)
    assert torch.equal(torch.cat([x for x, _ in draft.shards]), wanted)


def test_enlarging_keeps_what_is_smooth_and_stays_in_range() -> None:
    low, high = SPEC.bounds(torch.zeros(()))
    flat = low.expand(2, 3, 49, 65)
    torch.testing.assert_close(enlarge(flat, SPEC), low.expand(2, *SPEC.shape))
    ramp = torch.linspace(0, 1, 65).expand(1, 3, 49, 65)
    large = enlarge(ramp, SPEC)
    assert large.shape == (1, *SPEC.shape)
    torch.testing.assert_close(large[0, 0, 0], torch.linspace(0, 1, 130), rtol=0, atol=0.01)
    assert bool((enlarge(high.expand(2, 3, 49, 65), SPEC) <= high).all())


def test_the_statistics_come_as_close_as_at_the_full_size_alone() -> None:
    net, found = Sizes(), []
    for share in (0.0, 0.7):
        chosen = settings(coarse_share=share, refine_iterations=60, iterations=0)
        x, _ = synthesise(net, SPEC, chosen, num_classes=4, samples=4, seed=0)
        found.append(x)
    found.append(random_samples(SPEC, 4, torch.Generator().manual_seed(0)))
    with teach(net, SPEC, num_classes=4, first_aligned_layer=None) as teacher, torch.no_grad():
        full, coarse, noise = (statistics(teacher.observe(x).samples, teacher.references, "relative").item() for x in found)
    assert coarse < max(2 * full, 0.05 * noise)


def test_large_images_are_made_with_their_own_weight_of_the_class() -> None:
    sets = [
        synthesise(Sizes(), SPEC, settings(start="leaves", **keys), num_classes=4, samples=4, seed=0)[0]
        for keys in ({}, {"classification_weight": 0.001}, {"classification_weight": 0.01})
    ]
    assert torch.equal(sets[0], sets[1])
    assert not torch.equal(sets[0], sets[2])
