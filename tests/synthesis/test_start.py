"""Where the refinement begins: networks that were trained on photographs are told from others by their statistics alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from inc_clusterq.errors import ConfigError
from inc_clusterq.inputs import InputSpec
from inc_clusterq.synthesis.settings import ClusterQSettings
from inc_clusterq.synthesis.start import begins_with_leaves
from inc_clusterq.synthesis.teacher import teach

SPEC, SIGNAL = InputSpec((3, 40, 48), 0.0, 255.0, (120.0, 110.0, 100.0), (60.0,)), InputSpec((1, 200))


def photographs(rng: torch.Generator) -> Tensor:
    """Parts of two real photographs, of a flower and of a temple, at a quarter of their size."""
    whole = torch.stack([torch.tensor(image) for image in load_sample_images().images]).permute(0, 3, 1, 2).float()
    whole = nn.functional.interpolate(whole, scale_factor=0.25, mode="area")
    parts = []
    for number in range(64):
        top, left = (int(torch.randint(whole.shape[axis] - SPEC.shape[axis - 1], (), generator=rng)) for axis in (2, 3))
        parts.append(whole[number % 2, :, top : top + 40, left : left + 48])
    return torch.stack(parts)


def noise(rng: torch.Generator) -> Tensor:
    return 255 * torch.rand(64, *SPEC.shape, generator=rng)


def ripples(rng: torch.Generator) -> Tensor:
    """Waves of a few pixels, of another phase in each image, as a sensor of vibrations may give them."""
    phase = torch.rand(64, 3, 1, 1, generator=rng) * 6.28
    return 127.5 * (1 + (torch.arange(48) * 1.9 + phase).sin()).expand(64, 3, 40, 48)


def remembers(images: Tensor, spec: InputSpec = SPEC) -> nn.Module:
    """A network of random weights whose BatchNorm layers remember these images, given as raw values."""
    channels = spec.shape[0]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        conv, norm = (nn.Conv1d, nn.BatchNorm1d) if len(spec.shape) == 2 else (nn.Conv2d, nn.BatchNorm2d)
        layers = [conv(channels, 8, 3), norm(8, momentum=None), nn.ReLU(), conv(8, 12, 3, 2), norm(12, momentum=None)]
        net = nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
    low, high = spec.bounds(images)
    net.train()(torch.lerp(low, high, images / 255))
    return net.eval().requires_grad_(False)


def decided(net: nn.Module, spec: InputSpec = SPEC, **keys: Any) -> bool:
    with teach(net, spec, num_classes=4, first_aligned_layer=None) as teacher:
        return begins_with_leaves(ClusterQSettings.model_validate(keys), spec, teacher)


@pytest.mark.parametrize(("seen", "wanted"), [(photographs, True), (noise, False), (ripples, False)])
def test_leaves_are_for_networks_that_have_seen_photographs(seen: Callable[[torch.Generator], Tensor], wanted: bool) -> None:
    assert decided(remembers(seen(torch.Generator().manual_seed(0)))) is wanted


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [({"start": "leaves"}, True), ({"start": "generator"}, False), ({"refine_iterations": 0}, False)],
)
def test_a_start_that_was_asked_for_is_taken_and_leaves_are_never_left_unrefined(keys: dict[str, Any], wanted: bool) -> None:
    seen = noise if wanted else photographs
    assert decided(remembers(seen(torch.Generator().manual_seed(0))), **keys) is wanted


def test_the_network_sees_no_more_images_at_once_than_are_refined_together() -> None:
    net, sizes = remembers(photographs(torch.Generator().manual_seed(0))), list[int]()
    net.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    assert decided(net, refine_batch=5) is True
    assert max(sizes) == 5


def test_signals_begin_at_the_generator_and_leaves_for_them_are_refused() -> None:
    net = remembers(255 * torch.rand(8, *SIGNAL.shape, generator=torch.Generator().manual_seed(0)), SIGNAL)
    assert decided(net, SIGNAL) is False
    with pytest.raises(ConfigError, match=r"shape \[1, 200\]; use generator"):
        decided(net, SIGNAL, start="leaves")
