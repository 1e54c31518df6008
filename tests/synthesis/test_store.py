"""A set on disk comes back to the bit, says when it is not what it was, and is made once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inc_clusterq.synthesis.store as store
from inc_clusterq.errors import DatasetError, OutputError
from inc_clusterq.inputs import InputSpec
from inc_clusterq.synthesis.clusterq import synthesise
from inc_clusterq.synthesis.settings import ClusterQSettings
from inc_clusterq.synthesis.store import (
    MANIFEST,
    TENSORS,
    SyntheticDataset,
    cached_dataset,
    describe,
    load_dataset,
    request_key,
    save_dataset,
)


@pytest.fixture
def dataset() -> SyntheticDataset:
    inputs = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))
    return SyntheticDataset(inputs, torch.tensor([1, 0, 1, 0, 1]), {"made": "by hand"})


def test_a_set_comes_back_to_the_bit(tmp_path: Path, dataset: SyntheticDataset) -> None:
    saved = save_dataset(tmp_path / "deep" / "set", dataset)
    found = load_dataset(tmp_path / "deep" / "set")
    assert torch.equal(found.inputs, dataset.inputs)
    assert torch.equal(found.labels, dataset.labels)
    assert found.manifest == saved.manifest
    assert found.manifest["made"] == "by hand"
    assert sorted(os.listdir(tmp_path / "deep")) == ["set"]
    assert len(found) == 5
    assert torch.equal(found[2][0], dataset.inputs[2])
    assert found[2][1] == 1


def test_an_occupied_folder_is_left_alone(tmp_path: Path, dataset: SyntheticDataset) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine.txt").write_text("keep")
    with pytest.raises(OutputError, match="already exists"):
        save_dataset(tmp_path / "set", dataset)
    assert os.listdir(tmp_path) == ["set"]
    assert os.listdir(tmp_path / "set") == ["mine.txt"]
    with pytest.raises(OutputError, match=r"mine\.txt"):
        save_dataset(tmp_path / "set" / "mine.txt" / "below", dataset)


@pytest.mark.parametrize("name", [TENSORS, MANIFEST])
@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_a_single_wrong_byte_is_found_and_its_file_named(
    tmp_path: Path, dataset: SyntheticDataset, name: str, place: float
) -> None:
    save_dataset(tmp_path / "set", dataset)
    path = tmp_path / "set" / name
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 0x04
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=name.replace(".", r"\.")):
        load_dataset(tmp_path / "set")


def test_a_cut_or_missing_file_is_named(tmp_path: Path, dataset: SyntheticDataset) -> None:
    save_dataset(tmp_path / "set", dataset)
    path = tmp_path / "set" / TENSORS
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DatasetError, match=r"dataset\.safetensors is damaged"):
        load_dataset(tmp_path / "set")
    path.unlink()
    with pytest.raises(DatasetError, match=r"cannot read .*dataset\.safetensors"):
        load_dataset(tmp_path / "set")
    with pytest.raises(DatasetError, match=r"cannot read .*manifest\.json"):
        load_dataset(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("text", "problem"),
    [("{}", "does not describe"), ("[1]", "does not describe"), ("plain text", "is not JSON"), ('{"format": 3}', "does not")],
)
def test_a_foreign_folder_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(DatasetError, match=problem):
        load_dataset(tmp_path)


def test_a_set_of_another_version_is_refused(tmp_path: Path, dataset: SyntheticDataset) -> None:
    save_dataset(tmp_path / "set", dataset)
    path = tmp_path / "set" / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    with pytest.raises(DatasetError, match="has version 99, this program reads"):
        load_dataset(tmp_path / "set")


def test_everything_that_could_change_a_set_changes_its_key(spec: InputSpec, quick: ClusterQSettings) -> None:
    def key(fingerprint: str = "f", spec: InputSpec = spec, settings: ClusterQSettings = quick, **other: int) -> str:
        sizes = {"num_classes": 4, "samples": 8, "seed": 0, **other}
        return request_key(describe(fingerprint, spec, settings, **sizes))

    keys = [
        key(),
        key("g"),
        key(spec=InputSpec(spec.shape, spec.low, spec.high, spec.mean, (1.0,))),
        key(settings=quick.model_copy(update={"prior_weight": 0.5})),
        key(num_classes=5),
        key(samples=9),
        key(seed=1),
    ]
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]


@pytest.fixture
def request_of(trained: nn.Module, spec: InputSpec, quick: ClusterQSettings) -> dict[str, Any]:
    return {
        "module": trained, "fingerprint": "net", "spec": spec, "settings": quick, "num_classes": 4, "samples": 9, "seed": 0
    }  # fmt: skip


def test_a_cached_set_is_made_once(tmp_path: Path, request_of: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    first = cached_dataset(tmp_path / "cache", **request_of)

    def never(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise AssertionError("synthesised again")

    monkeypatch.setattr(store, "synthesise", never)
    second = cached_dataset(tmp_path / "cache", **request_of)
    assert torch.equal(first.inputs, second.inputs)
    with pytest.raises(AssertionError, match="synthesised again"):
        cached_dataset(tmp_path / "cache", **{**request_of, "seed": 1})


def test_a_set_under_the_wrong_name_is_refused(tmp_path: Path, request_of: dict[str, Any]) -> None:
    cached_dataset(tmp_path, **request_of)
    (folder,) = tmp_path.iterdir()
    wanted = describe(**{k: v for k, v in {**request_of, "seed": 1}.items() if k != "module"})
    folder.rename(tmp_path / request_key(wanted))
    with pytest.raises(DatasetError, match="another request"):
        cached_dataset(tmp_path, **{**request_of, "seed": 1})


def test_a_damaged_cached_set_is_named_and_not_used(tmp_path: Path, request_of: dict[str, Any]) -> None:
    cached_dataset(tmp_path, **request_of)
    (folder,) = tmp_path.iterdir()
    (folder / TENSORS).write_bytes(b"")
    with pytest.raises(DatasetError, match=r"dataset\.safetensors is damaged.*delete"):
        cached_dataset(tmp_path, **request_of)


def test_an_impossible_cache_is_refused_before_the_work(
    tmp_path: Path, request_of: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(store, "synthesise")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot create the folder"):
        cached_dataset(tmp_path / "file" / "cache", **request_of)


def test_a_slower_process_takes_the_set_of_the_faster_one(
    tmp_path: Path, request_of: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:

    def overtaken(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        monkeypatch.setattr(store, "synthesise", synthesise)
        cached_dataset(tmp_path, **request_of)
        inputs, labels = synthesise(*args, **kwargs)
        return inputs * 0, labels

    monkeypatch.setattr(store, "synthesise", overtaken)
    assert cached_dataset(tmp_path, **request_of).inputs.abs().max() > 0
    assert len(os.listdir(tmp_path)) == 1


RACE = """
import sys, time, torch
from pathlib import Path
from inc_clusterq.inputs import InputSpec
from inc_clusterq.synthesis.clusterq import synthesise
from inc_clusterq.synthesis.settings import ClusterQSettings
from inc_clusterq.synthesis.store import cached_dataset
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
settings = ClusterQSettings(iterations=3, warmup_iterations=1, batch_size=4, refine_iterations=2)
cache, me, other = (Path(argument) for argument in sys.argv[1:])
me.touch()
while not other.exists():
    time.sleep(0.001)
made = cached_dataset(cache, net, "net", InputSpec((3,)), settings, 4, 6, 0)
print(made.manifest["sha256"])
"""


def test_two_processes_that_race_share_one_whole_set(tmp_path: Path, root: Path) -> None:
    flags = [tmp_path / "a", tmp_path / "b"]
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, str(tmp_path / "cache"), str(me), str(other)],
            cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for me, other in (flags, flags[::-1])
    ]  # fmt: skip
    results = [racer.communicate(timeout=60) for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0], results
    assert results[0][0] == results[1][0]
    (folder,) = (tmp_path / "cache").iterdir()
    assert len(load_dataset(folder)) == 6
