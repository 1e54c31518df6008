from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, fx, nn

from inc_clusterq.reconstruction.bits import BitPlan
from inc_clusterq.reconstruction.checkpoint import UnitStore
from inc_clusterq.reconstruction.learning import keep_back
from inc_clusterq.reconstruction.quantizers import install_quantizers
from inc_clusterq.reconstruction.reconstruct import reconstruct
from inc_clusterq.reconstruction.settings import ReconstructionSettings
from inc_clusterq.reconstruction.views import count_views, with_views

Network = Callable[[str], tuple[nn.Module, Tensor]]
Prepare = Callable[[nn.Module, Tensor], fx.GraphModule]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def places(view: Tensor, image: Tensor, margin: int) -> list[tuple[int, int]]:
    """The shifts (down, right) by which the inner part of `view` is that of `image`."""
    height, width = image.shape[1:]
    inner = view[:, margin : height - margin, margin : width - margin]
    shifts = [(down, right) for down in range(-margin, margin + 1) for right in range(-margin, margin + 1)]
    return [
        (down, right)
        for down, right in shifts
        if torch.equal(inner, image[:, margin + down : height - margin + down, margin + right : width - margin + right])
    ]


@pytest.mark.parametrize(
    ("shape", "given", "views"),
    [
        ((256, 3, 32, 32), None, 4),
        ((512, 1, 24, 95), None, 2),
        ((1024, 3, 32, 32), None, 1),
        ((2000, 3, 32, 32), None, 1),
        ((256, 3, 96, 96), None, 1),
        ((256, 3, 224, 224), 3, 3),
        ((2000, 3, 32, 32), 2, 2),
        ((256, 1, 23, 40), 4, 1),
        ((256, 16), 4, 1),
        ((256, 2, 200), 4, 1),
        ((8, 3, 32, 32, 32), 4, 1),
    ],
)
def test_small_images_have_views_unless_there_are_enough_and_other_inputs_have_none(
    shape: tuple[int, ...], given: int | None, views: int
) -> None:
    assert count_views(torch.empty(shape, device="meta"), ReconstructionSettings(views=given)) == views


def test_every_view_shows_its_image_at_most_a_tenth_aside_and_odd_ones_are_mirrored() -> None:
    images = torch.randn(5, 3, 30, 40, generator=seeded())
    found = with_views(images, 4, seeded()).view(4, 5, 3, 30, 40)
    assert torch.equal(found[0], images)
    shifts = set()
    for number in (1, 2, 3):
        for view, image in zip(found[number], images, strict=True):
            [(down, right)] = places(view, image.flip(2) if number % 2 else image, margin=4)
            assert abs(down) <= 3
            assert abs(right) <= 4
            shifts.add((down, right))
    assert len(shifts) > 5


@pytest.mark.parametrize(("channels", "mirror"), [(1, True), (3, False)])
def test_what_has_one_channel_or_a_reading_direction_is_not_mirrored(channels: int, mirror: bool) -> None:
    images = torch.randn(2, channels, 30, 30, generator=seeded())
    views = with_views(images, 2, seeded(), mirror=mirror)[2:]
    assert all(places(view, image, 3) for view, image in zip(views, images, strict=True))


def test_what_comes_in_at_the_border_is_reflected_from_inside() -> None:
    image = torch.arange(30.0).expand(1, 1, 30, 30)
    rows = {tuple(view[0, 0].tolist()) for view in with_views(image, 16, seeded())}
    assert rows <= {tuple(abs(29 - abs(29 - column - shift)) for column in range(30)) for shift in range(-3, 4)}
    assert len(rows) > 3


def test_views_come_from_the_seed() -> None:
    images = torch.randn(4, 3, 32, 32, generator=seeded())
    assert torch.equal(with_views(images, 3, seeded(1)), with_views(images, 3, seeded(1)))
    assert not torch.equal(with_views(images, 3, seeded(1)), with_views(images, 3, seeded(2)))


def test_all_views_of_an_image_are_learned_from_or_judge() -> None:
    learned_from, judged_by = keep_back(16, 0.25, 3, torch.device("cpu"), views=3)
    assert sorted([*learned_from.tolist(), *judged_by.tolist()]) == list(range(48))
    assert len(judged_by) == 12
    assert not {number % 16 for number in learned_from.tolist()} & {number % 16 for number in judged_by.tolist()}


@pytest.mark.parametrize("mirror", [True, False])
def test_a_reconstruction_with_views_sees_the_images_and_their_views(network: Network, prepare: Prepare, mirror: bool) -> None:
    module, _ = network("residual")
    images = torch.randn(6, 3, 24, 24, generator=seeded())
    prepared = prepare(module, images)

    def rounded(inputs: Tensor, views: int) -> tuple[dict[str, Tensor], list[float]]:
        settings = ReconstructionSettings(iterations=0, granularity="block", views=views, mirror=mirror)
        graph = install_quantizers(deepcopy(prepared), BitPlan(3, 3), settings)
        report = reconstruct(graph, inputs, settings, seed=5, store=UnitStore(None))
        return graph.graph_module.state_dict(), [unit.loss for unit in report.units]

    state, losses = rounded(images, views=3)
    expected, expected_losses = rounded(with_views(images, 3, seeded(5), mirror=mirror), views=1)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert losses == expected_losses
    assert losses != rounded(images, views=1)[1]
