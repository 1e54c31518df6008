"""Dead leaves and waves: what they have in common with photographs, by measures of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from inc_clusterq.inputs import InputSpec
from inc_clusterq.synthesis.clusterq import synthesise
from inc_clusterq.synthesis.leaves import dead_leaves
from inc_clusterq.synthesis.settings import ClusterQSettings
from inc_clusterq.synthesis.spectrum import Waves, busyness, wave_weights


def slope(images: Tensor) -> float:
    """Exponent of the amplitude over frequency, fitted between 2 and a quarter of the size; NumPy's own transform."""
    size = images.shape[-1]
    power = (np.abs(np.fft.fft2(images.numpy())) ** 2).mean((0, 1))
    frequency = np.fft.fftfreq(size) * size
    radius = np.hypot(frequency[:, None], frequency[None])
    rings = np.arange(2, size // 4)
    amplitude = [np.sqrt(power[(radius >= ring) & (radius < ring + 1)].mean()) for ring in rings]
    return float(np.polyfit(np.log(rings + 0.5), np.log(amplitude), 1)[0])


def test_amplitudes_of_dead_leaves_fall_as_those_of_photographs() -> None:
    leaves = dead_leaves((3, 96, 96), 8, torch.Generator().manual_seed(0))
    # Photographs: between -0.7 and -1.5 (Tolhurst, Tadmor, Chao, 1992); white noise: 0
    assert -1.6 < slope(leaves) < -0.7
    assert abs(slope(torch.rand(8, 3, 96, 96, generator=torch.Generator().manual_seed(0)))) < 0.1


def test_dead_leaves_lie_in_the_range_and_cover_the_ground() -> None:
    leaves = dead_leaves((1, 40, 70), 4, torch.Generator().manual_seed(1))
    assert leaves.shape == (4, 1, 40, 70)
    assert float(leaves.min()) >= 0
    assert float(leaves.max()) <= 1
    assert (leaves == 0).float().mean() < 0.2
    assert not torch.equal(leaves[0], leaves[1])


def test_images_differ_in_brightness_cast_contrast_and_busyness() -> None:
    """As photographs do; by pixels alone, and against what leaves of one kind in one light have."""
    images = dead_leaves((3, 96, 96), 64, torch.Generator().manual_seed(3))
    grey = images.mean(1)
    deviation = grey.std((1, 2))
    busy = grey.diff(dim=2).abs().mean((1, 2)) / deviation
    cast = (images.mean((2, 3)) - grey.mean((1, 2))[:, None]).std()
    with pytest.MonkeyPatch.context() as patch:
        for name, alike in {"CONTRASTS": 0.0, "BRIGHTNESS": 0.0, "CAST": 0.0, "LARGEST": 0.021}.items():
            patch.setattr(f"inc_clusterq.synthesis.leaves.{name}", alike)
        one_kind = dead_leaves((3, 96, 96), 64, torch.Generator().manual_seed(3)).mean(1)
    lower, upper = deviation.quantile(torch.tensor([0.1, 0.9]))
    assert upper > 2 * lower
    lower, upper = busy.quantile(torch.tensor([0.1, 0.9]))
    assert upper > 2 * lower
    assert cast > 0.05
    assert grey.mean((1, 2)).std() > 1.4 * one_kind.mean((1, 2)).std()


def test_images_are_the_same_painted_one_by_one_where_leaves_lie_and_all_at_once() -> None:
    shape, samples = (2, 23, 40), 5
    at_once = dead_leaves(shape, samples, torch.Generator().manual_seed(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("inc_clusterq.synthesis.leaves.PAINTED_WHOLE", 0)
        one_by_one = dead_leaves(shape, samples, torch.Generator().manual_seed(2))
        patch.setattr("inc_clusterq.synthesis.leaves.CORNER", 0.5)
        cut = dead_leaves(shape, samples, torch.Generator().manual_seed(2))
    torch.testing.assert_close(at_once, one_by_one, rtol=0, atol=1e-5)
    assert (at_once - cut).abs().max() > 0.1


def test_one_seed_names_the_same_leaves() -> None:
    one, same, other = (dead_leaves((3, 20, 20), 2, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("space", [(8, 8), (7, 9), (6, 5), (10,), (4, 3, 6)])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_wave_step_changes_pixels_as_much_as_a_pixel_step(space: tuple[int, ...], alpha: float) -> None:
    full = np.sqrt(sum(np.square(axis) for axis in np.meshgrid(*(np.fft.fftfreq(n) * n for n in space), indexing="ij")))
    expected = np.maximum(full, 1) ** -alpha
    expected /= np.sqrt((expected**2).mean())
    found = wave_weights(space, alpha)
    torch.testing.assert_close(found, torch.from_numpy(expected[..., : space[-1] // 2 + 1]).float())


def test_waves_begin_at_the_start_and_stay_in_range() -> None:
    start = torch.rand(2, 3, 9, 12, generator=torch.Generator().manual_seed(0))
    waves = Waves(start, 1.0)
    torch.testing.assert_close(waves.unit(), start)
    with torch.no_grad():
        waves.parameter += 10 * torch.randn(waves.parameter.shape, generator=torch.Generator().manual_seed(1))
    moved = waves.unit().detach()
    assert float(moved.min()) == 0
    assert float(moved.max()) == 1


def test_a_step_of_every_wave_adds_what_falls_with_frequency() -> None:
    waves = Waves(torch.full((16, 1, 64, 64), 0.5), 1.0)
    with torch.no_grad():
        waves.parameter += 0.01 * torch.randn(waves.parameter.shape, generator=torch.Generator().manual_seed(0)).sign()
    assert slope(waves.unit().detach()) == pytest.approx(-1, abs=0.1)


@pytest.mark.parametrize("space", [(40,), (36, 48), (20, 18, 24)])
def test_busy_places_and_busy_images_are_moved_further_than_flat_ones(space: tuple[int, ...]) -> None:
    rng = torch.Generator().manual_seed(0)
    images = torch.full((2, 3, *space), 0.5)
    half = space[-1] // 2
    images[0, ..., :half] += 0.2 * torch.randn(images[0, ..., :half].shape, generator=rng)
    images[1] += 0.02 * torch.randn(images[1].shape, generator=rng)
    b = busyness(images)
    assert float(b.square().mean()) == pytest.approx(1, abs=1e-4)
    busy, border, flat, dim = b[0, ..., : half - 2].mean(), b[0, ..., half], b[0, ..., half + 3 :], b[1].mean()
    assert float(border.min()) > float(flat.max())
    assert busy > 2 * dim
    assert dim > 1.5 * flat.mean()


def test_where_all_places_are_alike_waves_move_all_as_far() -> None:
    torch.testing.assert_close(busyness(torch.full((2, 1, 9, 9), 0.3)), torch.ones(2, 1, 9, 9))


def test_waves_are_added_as_busyness_says() -> None:
    start = 0.4 + 0.2 * torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    start[..., :16] = 0.5
    waves, plain = Waves(start, 1.0), Waves(torch.full_like(start, 0.5), 1.0)
    step = 1e-3 * torch.randn(waves.parameter.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        waves.parameter += step
        plain.parameter += step
    torch.testing.assert_close(waves.unit() - start, busyness(start) * (plain.unit() - 0.5), atol=1e-6, rtol=1e-4)


def test_leaves_moved_by_waves_take_the_classes_and_statistics_of_the_model(trained: nn.Module, spec: InputSpec) -> None:
    settings = ClusterQSettings(
        start="leaves", refine_smoothness=1.0, refine_iterations=120, refine_batch=32, augmentation="none", coarse_share=0
    )
    x, y = synthesise(trained, spec, settings, num_classes=4, samples=32, seed=0)
    low, high = spec.bounds(x)
    assert bool(((x >= low) & (x <= high)).all())
    with torch.no_grad():
        assert (trained(x).argmax(1) == y).float().mean() > 0.9
