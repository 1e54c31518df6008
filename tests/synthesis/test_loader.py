"""The loader stands in for a user's own calibration loader."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import inc_clusterq.synthesis.loader as loader_module
from inc_clusterq import ClusterQDataLoader
from inc_clusterq.errors import ModelError
from inc_clusterq.inputs import InputSpec
from inc_clusterq.synthesis.dataset import SyntheticDataset
from inc_clusterq.synthesis.settings import ClusterQSettings
from inc_clusterq.synthesis.store import build_dataset


@pytest.fixture
def loader(trained: nn.Module, spec: InputSpec, quick: ClusterQSettings) -> ClusterQDataLoader:
    return ClusterQDataLoader(trained, spec, sampling_size=11, batch_size=4, seed=0, settings=quick)


def test_batches_hold_every_sample_once_the_short_last_one_too(loader: ClusterQDataLoader, spec: InputSpec) -> None:
    batches = list(loader)
    assert len(loader) == 3
    assert loader.batch_size == 4
    assert [len(labels) for _, labels in batches] == [4, 4, 3]
    assert batches[0][0].shape == (4, *spec.shape)
    assert torch.equal(torch.cat([inputs for inputs, _ in batches]), loader.dataset.inputs)
    assert torch.equal(torch.cat([labels for _, labels in batches]), loader.dataset.labels)


def test_it_can_be_read_twice_and_by_torch_itself(loader: ClusterQDataLoader) -> None:
    first, second = list(loader), list(loader)
    by_torch: DataLoader[tuple[Tensor, Tensor]] = DataLoader(loader.dataset, batch_size=4)  # type: ignore[arg-type]
    assert len(by_torch) == len(loader)
    for (x, y), (again, _), (inputs, labels) in zip(first, second, by_torch, strict=True):
        assert torch.equal(x, again)
        assert torch.equal(x, inputs)
        assert torch.equal(y, labels)


def test_who_changes_a_batch_changes_nothing_else(loader: ClusterQDataLoader) -> None:
    before = loader.dataset.inputs.clone()
    for inputs, labels in loader:
        inputs.zero_()
        labels.zero_()
    for inputs, _ in (loader.dataset[0], loader.dataset[10]):
        inputs.zero_()
    assert torch.equal(torch.cat([inputs for inputs, _ in loader]), before)


def test_it_yields_float32_whatever_the_default_is(
    trained: nn.Module, spec: InputSpec, quick: ClusterQSettings, loader: ClusterQDataLoader
) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        other = ClusterQDataLoader(trained, spec, sampling_size=11, batch_size=4, seed=0, settings=quick)
        (example,) = other.example_inputs
        found = torch.cat([inputs for inputs, _ in other])
    finally:
        torch.set_default_dtype(before)
    assert example.dtype == torch.float32
    assert torch.equal(found, loader.dataset.inputs)


def test_nothing_is_synthesised_before_it_is_needed_and_then_once_for_all_copies(
    loader: ClusterQDataLoader, monkeypatch: pytest.MonkeyPatch, spec: InputSpec
) -> None:
    calls = []

    def counted(*args: Any, **kwargs: Any) -> SyntheticDataset:
        calls.append(1)
        return build_dataset(*args, **kwargs)

    monkeypatch.setattr(loader_module, "build_dataset", counted)
    (example,) = loader.example_inputs
    low, high = spec.bounds(example)
    assert example.shape == (2, *spec.shape)
    assert bool(((example >= low) & (example <= high)).all())
    copied = copy.deepcopy(loader)
    assert not calls
    assert copied.dataset.inputs is loader.dataset.inputs
    assert copy.deepcopy(loader).dataset is loader.dataset
    assert len(calls) == 1


def test_a_manifest_says_where_the_set_comes_from(loader: ClusterQDataLoader) -> None:
    request = loader.dataset.manifest["request"]
    assert (request["samples"], request["seed"], request["num_classes"]) == (11, 0, 4)
    assert len(request["fingerprint"]) == 64


def test_a_cache_gives_the_same_set_to_the_next_loader(
    tmp_path: Path, trained: nn.Module, spec: InputSpec, quick: ClusterQSettings, loader: ClusterQDataLoader
) -> None:
    def again() -> Tensor:
        return ClusterQDataLoader(
            trained, spec, sampling_size=11, batch_size=5, seed=0, settings=quick, cache_dir=tmp_path
        ).dataset.inputs

    assert torch.equal(again(), loader.dataset.inputs)
    assert torch.equal(again(), loader.dataset.inputs)
    assert len(list(tmp_path.iterdir())) == 1


def test_calibrate_runs_every_batch_without_gradients(loader: ClusterQDataLoader) -> None:
    sizes = []

    class Observer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            out = x * self.scale
            assert not out.requires_grad
            sizes.append(len(x))
            return out

    loader.calibrate(Observer())
    assert sizes == [4, 4, 3]
    loader.calibrate(nn.Identity())


def test_defaults_follow_the_host(trained: nn.Module, spec: InputSpec) -> None:
    loader = ClusterQDataLoader(trained, spec)
    assert (loader.sampling_size, loader.batch_size, loader.seed) == (256, 32, 1978)
    assert loader.settings == ClusterQSettings(**ClusterQSettings.PRESETS["balanced"])
    assert len(loader) == 8


def test_mistakes_are_said_at_once(trained: nn.Module, spec: InputSpec) -> None:
    with pytest.raises(ModelError, match="no BatchNorm"):
        ClusterQDataLoader(nn.Sequential(nn.Flatten(), nn.Linear(126, 4)), spec)
    with pytest.raises(ModelError, match="does not take an input of shape"):
        ClusterQDataLoader(trained, InputSpec((3, 9, 7)))
    mistakes: list[dict[str, Any]] = [
        {"sampling_size": 0}, {"sampling_size": True}, {"batch_size": 0}, {"sampling_size": "many"}, {"seed": -1}, {"seed": 1.5}
    ]  # fmt: skip
    for wrong in mistakes:
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is .*; it must be a whole number"):
            ClusterQDataLoader(trained, spec, **wrong)
    with pytest.raises(ValueError, match=r"settings is 'fast'; it must be a ClusterQSettings"):
        ClusterQDataLoader(trained, spec, settings="fast")  # type: ignore[arg-type]
    assert len(ClusterQDataLoader(trained, spec, sampling_size=np.int64(33))) == 2  # type: ignore[arg-type]


def test_it_can_be_read_first_where_nothing_is_differentiated(
    loader: ClusterQDataLoader, trained: nn.Module, spec: InputSpec, quick: ClusterQSettings
) -> None:
    other = ClusterQDataLoader(trained, spec, sampling_size=11, batch_size=4, seed=0, settings=quick)
    with torch.inference_mode():
        inputs = other.dataset.inputs
    assert torch.equal(inputs, loader.dataset.inputs)


def test_a_set_that_is_not_finite_is_refused(spec: InputSpec, trained: nn.Module, quick: ClusterQSettings) -> None:
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = trained

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"features": self.body(x)}

    model = Features()
    dict(trained.named_buffers())["7.running_mean"].fill_(float("inf"))
    with pytest.raises(ModelError, match="not ended at finite numbers"):
        ClusterQDataLoader(model, spec, sampling_size=4, settings=quick).dataset  # noqa: B018 made when it is asked for
