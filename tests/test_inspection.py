from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from inc_clusterq.cli import app
from inc_clusterq.report.figures import first_of_each_class, picture
from inc_clusterq.synthesis.dataset import SyntheticDataset, load_dataset
from inc_clusterq.synthesis.store import write_dataset

NETS = """
    import torch
    from torch import nn

    def net(seed=0):
        torch.manual_seed(seed)
        body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))

    def other():
        return net(1)

    def features():
        return net()[0]

    def real():
        x = torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        return x, torch.arange(50) % 3
"""

JOB = """
    model: {{architecture: "python:{module}:{function}", input: {{shape: [1, 8, 8]}}}}
    quantization:
      calibration:
        sampling_size: 12
        dataloader: {{dataset: {{ClusterQ: {{iterations: 4, warmup_iterations: 2, refine_iterations: 2, refine_batch: 16}}}}}}
    evaluation: {evaluation}
"""


class Bench:
    """A folder with a user's module and a set `made` for its network."""

    def __init__(self, folder: Path, module: str) -> None:
        self.folder, self.module = folder, module

    def write(self, function: str = "net", evaluation: str = "{held_out: 16}") -> None:
        text = dedent(JOB).format(module=self.module, function=function, evaluation=evaluation)
        (self.folder / "job.yaml").write_text(text)

    def run(self, command: str, *arguments: str) -> Result:
        return CliRunner().invoke(app, [command, *arguments, "--quiet"])


@pytest.fixture
def bench(tmp_path: Path, write_module: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOGLEVEL", "ERROR")
    monkeypatch.setenv("TORCH_LOGS", "-all")
    bench = Bench(tmp_path, write_module(NETS))
    bench.write()
    assert bench.run("synthesize", "job.yaml", "--output", "made").exit_code == 0
    return bench


class Addresses(HTMLParser):
    """Everything that a page would load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href")]


def test_a_set_is_inspected_by_its_folder_alone_and_the_page_needs_no_other_file(bench: Bench) -> None:
    done = bench.run("inspect", "made")
    assert (done.exit_code, done.stderr) == (0, ""), done.output
    assert "28 synthetic inputs" in done.stdout
    assert "real" not in done.stdout
    page = (bench.folder / "made" / "inspection" / "inspection.html").read_text()
    addresses = Addresses(page).found
    assert len(addresses) == 4
    for address in addresses:
        kind, _, content = address.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(content).startswith(b"\x89PNG")
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)
    found = json.loads((bench.folder / "made" / "inspection" / "inspection.json").read_text())
    assert [layer["name"] for layer in found["synthetic"]["layers"]] == ["0.1", "0.4"]
    assert found["real"] is None
    assert bench.run("synthesize", "job.yaml", "--output", "made", "--overwrite").exit_code == 0


def test_real_inputs_come_from_a_function_a_file_or_the_yaml_and_agree(bench: Bench) -> None:
    rng = torch.Generator().manual_seed(1)
    np.savez(bench.folder / "real.npz", inputs=torch.rand(50, 1, 8, 8, generator=rng).numpy(), labels=np.arange(50) % 3)
    bench.write(evaluation=f'{{accuracy: {{dataset: "python:{bench.module}:real"}}}}')
    ways = (("--real", "real.npz"), ("--real", f"python:{bench.module}:real"), ("--config", "job.yaml"))
    found = []
    for number, way in enumerate(ways):
        done = bench.run("inspect", "made", *way, "--output", str(number))
        assert done.exit_code == 0, done.output
        assert "28 real" in done.stdout  # not more of them than synthetic ones
        found.append(json.loads((bench.folder / str(number) / "inspection.json").read_text()))
    assert found[0]["real"] == found[1]["real"] == found[2]["real"]
    assert found[0]["synthetic"] == found[1]["synthetic"]
    layers = found[0]["real"]["layers"]
    assert all((layer["real_coverage"], layer["real_excess"]) == (1, 0) for layer in layers)
    assert len(Addresses((bench.folder / "0" / "inspection.html").read_text()).found) == 5


def test_fewer_real_inputs_than_synthetic_ones_are_told(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    np.savez(bench.folder / "few.npz", inputs=torch.rand(5, 1, 8, 8).numpy(), labels=np.zeros(5, np.int64))
    done = bench.run("inspect", "made", "--real", "few.npz", "--output", "few")
    assert done.exit_code == 0, done.output
    assert "There are 5 real inputs and 28 synthetic ones" in caplog.text


def test_a_set_without_classes_is_inspected_too(bench: Bench) -> None:
    bench.write("features")
    assert bench.run("synthesize", "job.yaml", "--output", "maps").exit_code == 0
    done = bench.run("inspect", "maps")
    assert done.exit_code == 0, done.output
    assert "BatchNorm statistics alone" in (bench.folder / "maps" / "inspection" / "inspection.html").read_text()


def test_a_set_for_another_input_of_the_same_model_is_refused(bench: Bench) -> None:
    text = (bench.folder / "job.yaml").read_text()
    (bench.folder / "job.yaml").write_text(text.replace("shape: [1, 8, 8]", "shape: [1, 8, 8], std: 0.5"))
    done = bench.run("inspect", "made", "--config", "job.yaml")
    assert done.exit_code == 2
    assert "made was made for another" in done.stderr


def test_code_that_lies_in_a_set_is_not_run(bench: Bench) -> None:
    dataset = load_dataset(bench.folder / "made")
    dataset.manifest["source"]["folder"] = "."
    write_dataset(bench.folder / "foreign", dataset)
    (bench.folder / "foreign" / f"{bench.module}.py").write_text("raise RuntimeError('run')")
    done = bench.run("inspect", "foreign")
    assert done.exit_code == 2
    assert "none of its own code is run" in done.stderr


def without_source(folder: Path) -> None:
    dataset = load_dataset(folder)
    del dataset.manifest["source"]
    write_dataset(folder.with_name("anonymous"), dataset)


def test_a_set_that_names_no_model_asks_for_the_yaml(bench: Bench) -> None:
    without_source(bench.folder / "made")
    done = bench.run("inspect", "anonymous")
    assert done.exit_code == 2
    assert "name the job's YAML by --config" in done.stderr
    assert bench.run("inspect", "anonymous", "--config", "job.yaml").exit_code == 0


def test_a_set_made_by_hand_is_not_taken_for_one_of_this_model(bench: Bench) -> None:
    write_dataset(bench.folder / "hand", SyntheticDataset(((torch.zeros(4, 1, 8, 8), torch.arange(4)),), {}))
    done = bench.run("inspect", "hand", "--config", "job.yaml")
    assert done.exit_code == 2
    assert "was made for another model" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "cannot read nowhere/manifest.json"),
        (("made", "--real", "nowhere.npz"), "cannot read nowhere.npz"),
        (("made", "--real", "job.yaml"), "job.yaml is not an .npz file"),
        (("made", "--real", "python:data"), "it must read python:package.module:function, or name an .npz file"),
        (("made", "--real", "half.npz"), "half.npz has no array 'labels'"),
        (("made", "--real", "large.npz"), "they must be floats of shape (N, 1, 8, 8)"),
        (("made", "--real", "text.npz"), "text.npz is not an .npz file of numbers"),
        (("made", "--config", "other.yaml"), "was made for another model"),
        (("made", "--output", "mine"), "holds other files"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(bench: Bench, arguments: tuple[str, ...], message: str) -> None:
    bench.write("other")
    (bench.folder / "job.yaml").rename(bench.folder / "other.yaml")
    bench.write()
    np.savez(bench.folder / "half.npz", inputs=np.zeros((2, 1, 8, 8), np.float32))
    np.savez(bench.folder / "large.npz", inputs=np.zeros((2, 1, 9, 9), np.float32), labels=np.zeros(2, np.int64))
    np.savez(bench.folder / "text.npz", inputs=np.array(["a"]), labels=np.zeros(1, np.int64))
    (bench.folder / "mine").mkdir()
    (bench.folder / "mine" / "thesis.tex").write_text("mine")
    before = sorted(bench.folder.rglob("*"))
    done = bench.run("inspect", *arguments)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert "Traceback" not in done.output
    assert [path for path in sorted(bench.folder.rglob("*")) if "__pycache__" not in path.parts] == [
        path for path in before if "__pycache__" not in path.parts
    ]


@pytest.mark.parametrize(
    ("shape", "shown"),
    [
        ((5,), (1, 5)),
        ((2, 49), (2, 49)),
        ((1, 4, 6), (4, 6)),
        ((3, 4, 6), (4, 6, 3)),
        ((4, 4, 6), (4, 6)),
        ((1, 5, 4, 6), (4, 6)),
    ],
)
def test_any_input_can_be_shown(shape: tuple[int, ...], shown: tuple[int, ...]) -> None:
    assert picture(torch.rand(shape)).shape == shown


def test_a_gallery_takes_every_class_before_it_repeats_one() -> None:
    labels = torch.tensor([2, 2, 0, 1, 0, 2])
    assert first_of_each_class(labels, 4).tolist() == [2, 3, 0, 4]
    assert first_of_each_class(labels, 99).tolist() == [2, 3, 0, 4, 1, 5]
