from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from typer.testing import CliRunner, Result

from inc_clusterq.cli import app
from inc_clusterq.synthesis.dataset import MANIFEST, load_dataset

NETS = """
    import torch
    from torch import nn

    def body():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))

    def net():
        return nn.Sequential(body(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))

    class Returning(nn.Module):
        def __init__(self, how):
            super().__init__()
            self.body, self.how = body(), how

        def forward(self, x):
            y = self.body(x)
            returned = {"features": y, "tuple": (y, y.mean()), "dict": {"boxes": y.flatten(1)}, "list": [y]}
            return {**returned, "shares": y.mean((2, 3)).softmax(1)}[self.how]

    def features():
        return Returning("features")

    def shares():
        return Returning("shares")

    def tuples():
        return Returning("tuple")

    def dicts():
        return Returning("dict")

    def lists():
        return Returning("list")

    def without_batch_norm():
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 3))
"""

JOB = """
    model: {{architecture: "python:{module}:{function}", input: {{shape: [1, 8, 8]}}}}
    quantization:
      calibration:
        sampling_size: 12
        dataloader: {{dataset: {{ClusterQ: {{iterations: 4, warmup_iterations: 2, refine_iterations: 2, refine_batch: 16}}}}}}
    evaluation: {{held_out: 16}}
"""


class Bench:
    """A folder with a user's module, in which sets are made by the command line."""

    def __init__(self, folder: Path, module: str) -> None:
        self.folder, self.module = folder, module

    def run(self, *arguments: str, function: str = "net") -> Result:
        (self.folder / "job.yaml").write_text(dedent(JOB).format(module=self.module, function=function))
        return CliRunner().invoke(app, ["synthesize", "job.yaml", *arguments])

    @property
    def cached(self) -> list[Path]:
        cache = self.folder / "nc_workspace" / "synthetic"
        return sorted(cache.iterdir()) if cache.exists() else []


@pytest.fixture
def bench(tmp_path: Path, write_module: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOGLEVEL", "ERROR")
    monkeypatch.setenv("TORCH_LOGS", "-all")
    return Bench(tmp_path, write_module(NETS))


def test_a_set_is_made_once_and_then_found(bench: Bench) -> None:
    first, second = bench.run(), bench.run()
    assert (first.exit_code, second.exit_code) == (0, 0), first.output
    (folder,) = bench.cached
    assert "28 synthetic inputs of shape [1, 8, 8]: 12 to calibrate with, 16 held out to score; 2 shard(s)." in first.stdout
    assert first.stdout.splitlines()[-1].endswith(str(folder.relative_to(bench.folder)))
    assert first.stdout.splitlines()[-1].startswith("Saved in")
    assert second.stdout.splitlines()[-1].startswith("Found in")
    assert "Training" in first.stderr
    assert second.stderr == ""
    assert bench.run("--seed", "3", "--quiet").stderr == ""
    assert len(bench.cached) == 2


def test_a_copy_is_the_same_set_and_knows_its_model(bench: Bench) -> None:
    done = bench.run("--output", "deep/copy")
    assert done.exit_code == 0, done.output
    copy, cached = load_dataset(bench.folder / "deep" / "copy"), load_dataset(bench.cached[0])
    assert torch.equal(copy.inputs, cached.inputs)
    assert copy.manifest["request"] == cached.manifest["request"]
    assert copy.manifest["source"]["folder"] == "../.."
    assert cached.manifest["source"]["folder"] == "../../.."
    assert copy.manifest["source"]["model"]["architecture"] == f"python:{bench.module}:net"
    assert bench.run("--output", "deep/copy").exit_code == 2
    assert bench.run("--output", "deep/copy", "--overwrite").exit_code == 0
    assert [file.name for file in (bench.folder / "deep").iterdir()] == ["copy"]


def test_an_output_with_other_files_is_refused_before_any_work(bench: Bench) -> None:
    (bench.folder / "mine").mkdir()
    (bench.folder / "mine" / "thesis.tex").write_text("mine")
    done = bench.run("--output", "mine", "--overwrite")
    assert done.exit_code == 2
    assert [file.name for file in (bench.folder / "mine").iterdir()] == ["thesis.tex"]
    assert bench.cached == []


@pytest.mark.parametrize(
    ("function", "returned"),
    [("features", "float32 of shape"), ("shares", "probabilities"), ("tuples", "tuple"), ("dicts", "dict"), ("lists", "list")],
)
def test_a_model_without_logits_is_served_by_its_statistics_alone_and_the_command_says_so(
    bench: Bench, function: str, returned: str
) -> None:
    done = bench.run(function=function)
    assert done.exit_code == 0, done.output
    assert "Matched to the BatchNorm statistics alone, labels are -1: the model returns" in done.stdout
    assert returned in done.stdout
    dataset = load_dataset(bench.cached[0])
    assert dataset.labels.unique().tolist() == [-1]
    assert json.loads((bench.cached[0] / MANIFEST).read_text())["request"]["num_classes"] == 0


def test_a_model_without_batch_norm_is_told_what_to_do_and_nothing_is_left(bench: Bench) -> None:
    done = bench.run(function="without_batch_norm")
    assert done.exit_code == 2
    assert "has no BatchNorm layer with running statistics" in done.stderr
    assert not (bench.folder / "nc_workspace").exists()


def test_a_damaged_set_is_one_sentence_that_names_the_file(bench: Bench) -> None:
    bench.run()
    shard = bench.cached[0] / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    done = bench.run()
    assert (done.exit_code, done.stdout) == (2, "")
    assert "shard-00001.safetensors is damaged" in done.stderr
    assert "Traceback" not in done.stderr
