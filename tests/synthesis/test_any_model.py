"""What the method needs is BatchNorm and nothing else: any dimension, order, channel count, class count, any output."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from inc_clusterq import ClusterQDataLoader
from inc_clusterq.inputs import InputSpec
from inc_clusterq.synthesis.clusterq import synthesise
from inc_clusterq.synthesis.objective import statistics
from inc_clusterq.synthesis.refine import random_samples
from inc_clusterq.synthesis.settings import ClusterQSettings
from inc_clusterq.synthesis.teacher import teach

QUICK = ClusterQSettings(iterations=20, warmup_iterations=10, batch_size=16, refine_iterations=40, refine_batch=16)


def settled(net: nn.Module, spec: InputSpec, offset: float = 0.25) -> nn.Module:
    """Statistics of inputs that are darker than noise around the middle, and less spread."""
    rng = torch.Generator().manual_seed(1)
    low, high = spec.bounds(torch.zeros(()))
    for part in net.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.momentum = None  # plain average
    with torch.no_grad():
        for _ in range(10):
            share = offset + 0.1 * torch.randn(32, *spec.shape, generator=rng)
            net.train()(low + (high - low) * share.clamp(0, 1))
    return net.eval()


def mix(dims: int, a: int, b: int, groups: int = 1) -> nn.Module:
    kinds = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    return kinds[dims](a, b, 3, padding=1, groups=groups)


def norm(dims: int, channels: int) -> nn.Module:
    kinds = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
    return kinds[dims](channels)


class Pooled(nn.Module):
    """A body, the mean over space, and a linear layer."""

    def __init__(self, body: nn.Module, channels: int, classes: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.body(x).flatten(2).mean(2))
        return result


def body(kind: str, dims: int, channels: int) -> nn.Module:
    if kind == "conv, BN, ReLU":
        layers = [mix(dims, channels, 8), norm(dims, 8), nn.ReLU(), mix(dims, 8, 8), norm(dims, 8), nn.ReLU()]
    elif kind == "conv, ReLU, BN":
        layers = [mix(dims, channels, 8), nn.ReLU(), norm(dims, 8), mix(dims, 8, 8), nn.ReLU(), norm(dims, 8)]
    elif kind == "BN, conv":
        layers = [norm(dims, channels), mix(dims, channels, 8), nn.ReLU(), norm(dims, 8), mix(dims, 8, 8)]
    elif kind == "depthwise":
        layers = [mix(dims, channels, 8), norm(dims, 8), nn.ReLU6(), mix(dims, 8, 8, groups=8), norm(dims, 8), nn.ReLU6()]
    else:
        shared = norm(dims, 8)
        layers = [mix(dims, channels, 8), shared, nn.ReLU(), mix(dims, 8, 8), shared, nn.ReLU()]
    return nn.Sequential(*layers)


CASES = [
    ("conv, BN, ReLU", (1, 49, 10), 12),  # keyword spotting: spectra, not images
    ("conv, BN, ReLU", (4, 9, 12), 3),
    ("conv, ReLU, BN", (1, 12, 12), 2),
    ("conv, ReLU, BN", (3, 10, 10), 5),
    ("BN, conv", (3, 10, 10), 5),
    ("depthwise", (3, 10, 10), 5),
    ("shared", (3, 10, 10), 5),
    ("conv, BN, ReLU", (2, 40), 4),
    ("conv, ReLU, BN", (2, 40), 4),
    ("conv, BN, ReLU", (1, 6, 6, 6), 3),
    ("conv, ReLU, BN", (2, 4, 6, 5), 3),
]


def distances(net: nn.Module, spec: InputSpec, classes: int, *inputs: Tensor) -> list[float]:
    with teach(net, spec, num_classes=classes, first_aligned_layer=None) as teacher, torch.no_grad():
        return [statistics(teacher.observe(x).samples, teacher.references, "relative").item() for x in inputs]


@pytest.mark.parametrize(("kind", "shape", "classes"), CASES)
def test_the_set_comes_far_closer_to_the_statistics_than_noise(kind: str, shape: tuple[int, ...], classes: int) -> None:
    spec = InputSpec(shape, -2.0, 6.0, (0.5,), (2.0,))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = settled(Pooled(body(kind, len(shape) - 1, shape[0]), 8, classes), spec)
    x, y = synthesise(net, spec, QUICK, num_classes=classes, samples=24, seed=0)
    ours, noise = distances(net, spec, classes, x, random_samples(spec, 24, torch.Generator().manual_seed(0)))
    assert ours < 0.2 * noise
    assert y.bincount(minlength=classes).max() - y.bincount(minlength=classes).min() <= 1


@pytest.mark.parametrize("start", ["generator", "leaves"])
def test_a_thousand_classes_with_a_few_samples_each_or_none_work(start: str) -> None:
    spec = InputSpec((3, 8, 8))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = settled(Pooled(body("conv, BN, ReLU", 2, 3), 8, 1000), spec)
    few = {"start": start, "refine_iterations": 2, "refine_batch": 64, "centroid_samples": 1, "batch_size": 64}
    settings = QUICK.model_copy(update=few)
    for samples in (70, 2000):
        x, y = synthesise(net, spec, settings, num_classes=1000, samples=samples, seed=0)
        assert (len(x), len(y.unique())) == (samples, min(samples, 1000))
        assert int(y.bincount().max()) == max(1, samples // 1000)
        assert bool(x.isfinite().all())


class Detector(nn.Module):
    """Two maps in a dictionary, as detectors return."""

    def __init__(self) -> None:
        super().__init__()
        self.body = body("conv, BN, ReLU", 2, 3)

    def forward(self, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        y = self.body(x)
        return {"maps": (y, y[:, :1])}


def test_statistics_alone_are_matched_where_there_are_no_logits(caplog: pytest.LogCaptureFixture) -> None:
    spec = InputSpec((3, 10, 10))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = settled(Detector(), spec)
    with caplog.at_level(logging.WARNING):
        loader = ClusterQDataLoader(net, spec, sampling_size=24, batch_size=10, seed=0, settings=QUICK)
    assert "the model returns dict" in caplog.text
    assert "BatchNorm statistics alone" in caplog.text
    batches = list(loader)
    assert [len(x) for x, _ in batches] == [10, 10, 4]
    assert all(bool((y == -1).all()) for _, y in batches)
    ours, noise = distances(net, spec, 0, loader.dataset.inputs, random_samples(spec, 24, torch.Generator().manual_seed(0)))
    assert ours < 0.2 * noise
