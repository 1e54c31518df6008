"""A small network that has learned something, and sees it again in its BatchNorm statistics."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from inc_clusterq.inputs import InputSpec
from inc_clusterq.synthesis.settings import ClusterQSettings

CLASSES = 4
SPEC = InputSpec((2, 9, 7), 0.0, 255.0, (100.0, 120.0), (50.0, 60.0))


def stripes(samples: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Four classes of noisy images: bright top, bright left, checks, bright second channel."""
    labels = torch.randint(0, CLASSES, (samples,), generator=rng)
    patterns = torch.full((CLASSES, *SPEC.shape), 80.0)
    patterns[0, :, :4] += 90
    patterns[1, :, :, :3] += 90
    patterns[2, :, ::2, ::2] += 120
    patterns[3, 1] += 90
    raw = patterns[labels] + 25 * torch.randn(samples, *SPEC.shape, generator=rng)
    return SPEC.normalise(raw.clamp(SPEC.low, SPEC.high)), labels


def build() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    )


@pytest.fixture(scope="session")
def _trained_once() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = build()
    rng = torch.Generator().manual_seed(5)
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(120):
        x, y = stripes(64, rng)
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimiser.step()
    net.zero_grad()
    return net.eval()


@pytest.fixture
def trained(_trained_once: nn.Sequential) -> nn.Sequential:
    """A trained classifier of four classes for inputs of `spec`; a fresh copy per test."""
    return copy.deepcopy(_trained_once)


@pytest.fixture
def spec() -> InputSpec:
    return SPEC


@pytest.fixture
def real(_trained_once: nn.Module) -> tuple[Tensor, Tensor]:
    """200 inputs and labels that the network knows."""
    return stripes(200, torch.Generator().manual_seed(11))


@pytest.fixture
def quick() -> ClusterQSettings:
    """Both phases, a second at most."""
    return ClusterQSettings(
        iterations=6, warmup_iterations=3, batch_size=8, latent_size=8, centroid_samples=2, refine_iterations=4, refine_batch=8
    )
