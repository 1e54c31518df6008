"""A set on disk comes back to the bit, says when it is not what it was, and is made once."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import inc_clusterq.synthesis.store as store
from inc_clusterq.errors import DatasetError, OutputError
from inc_clusterq.inputs import InputSpec
from inc_clusterq.synthesis.dataset import FORMAT, MANIFEST, VERSION, SyntheticDataset, canonical, load_dataset
from inc_clusterq.synthesis.draft import FolderDraft, sha256, shard_name
from inc_clusterq.synthesis.settings import ClusterQSettings
from inc_clusterq.synthesis.store import cached_dataset, describe, request_key, write_dataset

SHARDS = [shard_name(0), shard_name(1)]


@pytest.fixture
def dataset() -> SyntheticDataset:
    inputs = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 0, 1, 0, 1])
    return SyntheticDataset(((inputs[:3], labels[:3]), (inputs[3:], labels[3:])), {"made": "by hand"})


def test_a_set_comes_back_to_the_bit(tmp_path: Path, dataset: SyntheticDataset) -> None:
    write_dataset(tmp_path / "deep" / "set", dataset)
    found = load_dataset(tmp_path / "deep" / "set")
    assert torch.equal(found.inputs, dataset.inputs)
    assert torch.equal(found.labels, dataset.labels)
    assert found.manifest["made"] == "by hand"
    assert sorted(os.listdir(tmp_path / "deep")) == ["set"]
    assert len(found) == 5
    assert torch.equal(found[2][0], dataset.inputs[2])
    assert found[2][1] == 1


@pytest.mark.parametrize("name", [*SHARDS, MANIFEST])
@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_a_single_wrong_byte_is_found_and_its_file_named(
    tmp_path: Path, dataset: SyntheticDataset, name: str, place: float
) -> None:
    write_dataset(tmp_path / "set", dataset)
    path = tmp_path / "set" / name
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 0x04
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=name.replace(".", r"\.")):
        load_dataset(tmp_path / "set")


def test_a_cut_missing_or_exchanged_file_is_named(tmp_path: Path, dataset: SyntheticDataset) -> None:
    write_dataset(tmp_path / "set", dataset)
    first, second = (tmp_path / "set" / name for name in SHARDS)
    whole = second.read_bytes()
    second.write_bytes(whole[:-1])
    with pytest.raises(DatasetError, match=r"shard-00001\.safetensors is damaged"):
        load_dataset(tmp_path / "set")
    second.write_bytes(first.read_bytes())
    with pytest.raises(DatasetError, match=r"shard-00001\.safetensors is damaged, or belongs to another set"):
        load_dataset(tmp_path / "set")
    second.unlink()
    with pytest.raises(DatasetError, match=r"cannot read .*shard-00001\.safetensors"):
        load_dataset(tmp_path / "set")
    with pytest.raises(DatasetError, match=r"cannot read .*manifest\.json"):
        load_dataset(tmp_path / "nothing")


def test_a_set_is_mapped_and_not_copied_into_memory(tmp_path: Path, dataset: SyntheticDataset) -> None:
    write_dataset(tmp_path / "set", dataset)
    found = load_dataset(tmp_path / "set")
    mapped = Path("/proc/self/maps").read_text()
    assert all(name in mapped for name in SHARDS)
    assert torch.equal(found[4][0], dataset.inputs[4])
    with pytest.raises(IndexError, match="sample 5 of a set of 5"):
        found[5]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 9])
def test_batches_cross_the_borders_of_shards(dataset: SyntheticDataset, size: int) -> None:
    batches = list(dataset.batches(size))
    for (inputs, labels), x, y in zip(batches, dataset.inputs.split(size), dataset.labels.split(size), strict=True):
        assert torch.equal(inputs, x)
        assert torch.equal(labels, y)


@pytest.mark.parametrize(
    ("text", "problem"),
    [("{}", "does not describe"), ("[1]", "does not describe"), ("plain text", "is not JSON"), ('{"format": 3}', "does not")],
)
def test_a_foreign_folder_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(DatasetError, match=problem):
        load_dataset(tmp_path)


@pytest.mark.parametrize("shards", [None, {}, [{}], ["a"]])
def test_a_manifest_made_by_hand_must_list_its_shards(tmp_path: Path, shards: object) -> None:
    manifest = {"format": FORMAT, "version": VERSION, "shards": shards}
    (tmp_path / MANIFEST).write_text(json.dumps({**manifest, "checksum": sha256(canonical(manifest))}))
    with pytest.raises(DatasetError, match="does not list shards and their SHA-256"):
        load_dataset(tmp_path)


def test_a_set_of_another_version_is_refused(tmp_path: Path, dataset: SyntheticDataset) -> None:
    write_dataset(tmp_path / "set", dataset)
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

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("synthesised again")

    monkeypatch.setattr(store, "synthesise_into", never)
    second = cached_dataset(tmp_path / "cache", **request_of)
    assert torch.equal(first.inputs, second.inputs)
    with pytest.raises(AssertionError, match="synthesised again"):
        cached_dataset(tmp_path / "cache", **{**request_of, "seed": 1})


def test_the_manifest_tells_how_what_was_left_open_was_decided_and_asking_for_that_gives_the_same_bits(
    tmp_path: Path, request_of: dict[str, Any]
) -> None:
    found = cached_dataset(tmp_path / "cache", **request_of)
    asked, decided = found.manifest["request"]["settings"], found.manifest["decided"]
    assert None not in decided.values()
    assert {name for name, value in asked.items() if value is None} > {"start", "learning_rate", "bfloat16"}
    assert decided["start"] == "generator"  # stripes in two channels are no photographs
    outright = cached_dataset(tmp_path / "cache", **{**request_of, "settings": ClusterQSettings(**decided)})
    assert outright.manifest["request"] != found.manifest["request"]
    assert torch.equal(outright.inputs, found.inputs)


def test_what_a_kill_after_the_renaming_left_is_removed(tmp_path: Path, request_of: dict[str, Any]) -> None:
    cached_dataset(tmp_path, **request_of)
    (folder,) = tmp_path.iterdir()
    FolderDraft(tmp_path / f".{folder.name}.partial").keep("training", {"done": torch.tensor(6)})
    cached_dataset(tmp_path, **request_of)
    assert os.listdir(tmp_path) == [folder.name]


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
    (folder / SHARDS[0]).write_bytes(b"")
    with pytest.raises(DatasetError, match=r"shard-00000\.safetensors is damaged.*delete"):
        cached_dataset(tmp_path, **request_of)


def test_an_impossible_cache_is_refused_before_the_work(
    tmp_path: Path, request_of: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(store, "synthesise_into")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot create the folder"):
        cached_dataset(tmp_path / "file" / "cache", **request_of)


@pytest.mark.parametrize("answers", [[errno.ENOSYS], [errno.EWOULDBLOCK, errno.EIO]], ids=["at once", "while waiting"])
def test_a_file_system_without_locks_is_refused_rather_than_locked_by_a_file_that_outlives_its_process(
    answers: list[int], tmp_path: Path, request_of: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = iter(answers)

    def fails(*_: object) -> None:
        number = next(errors)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", fails)
    with pytest.raises(OutputError, match=r"cannot lock .* on a file system with locks"):
        cached_dataset(tmp_path, **request_of)


def test_what_was_begun_is_not_continued_where_it_is_damaged(
    tmp_path: Path, request_of: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    cached_dataset(tmp_path / "whole", **request_of)
    (whole,) = (tmp_path / "whole").iterdir()
    partial = tmp_path / "cache" / f".{whole.name}.partial"
    draft = FolderDraft(partial)
    draft.add(torch.zeros(5, 2, 9, 7), torch.zeros(5, dtype=torch.int64), "batches", {"rng": torch.zeros(3)})
    state = bytearray((partial / "batches.safetensors").read_bytes())
    state[-1] ^= 1
    (partial / "batches.safetensors").write_bytes(state)
    again = cached_dataset(tmp_path / "cache", **request_of)
    assert "batches.safetensors is damaged" in caplog.text
    assert torch.equal(again.inputs, load_dataset(whole).inputs)
    assert os.listdir(tmp_path / "cache") == [whole.name]


JOB = """
import os, signal, sys, time, torch
from contextlib import contextmanager
from pathlib import Path
from inc_clusterq.inputs import InputSpec
from inc_clusterq.synthesis import draft
from inc_clusterq.synthesis.settings import ClusterQSettings
from inc_clusterq.synthesis.store import cached_dataset
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU(), torch.nn.Linear(4, 4))
settings = ClusterQSettings(iterations=6, warmup_iterations=2, batch_size=4, refine_iterations=3, refine_batch=2)
cache, last, dies = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "dies"
draft.SAVE_SECONDS = 0

class Watch:
    single = 0  # steps that were made here, and not taken over
    @contextmanager
    def stage(self, title, total):
        (cache.parent / title.split()[0]).touch()
        yield self
    def advance(self, steps=1, note=""):
        self.single += note not in ("", "resumed")
        if self.single == last and dies:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.single == last:
            time.sleep(60)
    skip = advance

watch = Watch()
made = cached_dataset(cache, net, "net", InputSpec((3,)), settings, 4, 7, 0, progress=watch)
print(watch.single, *(shard["sha256"] for shard in made.manifest["shards"]))
"""


def start_job(root: Path, cache: Path, last: int, then: str = "dies") -> subprocess.Popen[str]:
    """A process that makes a set, and at its step `last` dies or sleeps."""
    command = [sys.executable, "-c", JOB, str(cache), str(last), then]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_job(root: Path, cache: Path, last: int) -> tuple[int, list[str]]:
    process = start_job(root, cache, last)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output.split()


def wait_for(file: Path) -> None:
    for _ in range(6000):
        if file.exists():
            return
        time.sleep(0.01)
    raise AssertionError(f"{file} has not appeared")


@pytest.mark.slow
def test_a_process_killed_anywhere_is_continued_to_the_same_bits(tmp_path: Path, root: Path) -> None:
    # 6 steps of the generator, then 4 batches of 3; the step in which a process dies is lost, and the batch it belongs to
    status, (steps, *wanted) = run_job(root, tmp_path / "whole", -1)
    assert (status, steps, len(wanted)) == (0, "18", 4)
    for killed, left in ((2, 17), (5, 14), (8, 12), (14, 6)):
        cache = tmp_path / str(killed)
        assert run_job(root, cache, killed)[0] == -signal.SIGKILL
        assert not [name for name in os.listdir(cache) if not name.startswith(".")]
        status, (steps, *found) = run_job(root, cache, -1)
        assert (status, int(steps), found) == (0, left, wanted)
        assert len(os.listdir(cache)) == 1


def test_half_a_shard_of_a_killed_process_does_not_get_into_the_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    draft = FolderDraft(tmp_path / "draft")
    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        draft.add(torch.zeros(2, 3), torch.zeros(2).long(), "batches", {})
    assert list(draft.set.iterdir()) == []


def test_who_waits_for_a_process_that_is_killed_takes_over_its_work(tmp_path: Path, root: Path) -> None:
    _, (_, *wanted) = run_job(root, tmp_path / "whole", -1)
    (tmp_path / "shared").mkdir()
    cache = tmp_path / "shared" / "cache"
    first = start_job(root, cache, 14, "sleeps")
    wait_for(cache.parent / "Refining")
    second = start_job(root, cache, -1)
    wait_for(cache.parent / "Waiting")
    assert second.poll() is None
    first.kill()
    first.communicate(timeout=60)
    output, errors = second.communicate(timeout=60)
    assert second.returncode == 0, errors
    steps, *found = output.split()
    assert found == wanted
    assert int(steps) < 18
    assert len(os.listdir(cache)) == 1


RACE = """
import sys, time, torch
from pathlib import Path
from inc_clusterq.inputs import InputSpec
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
print(*(shard["sha256"] for shard in made.manifest["shards"]))
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
    assert results[0][0] != ""
    (folder,) = (tmp_path / "cache").iterdir()
    assert len(load_dataset(folder)) == 6
