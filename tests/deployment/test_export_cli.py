from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from inc_clusterq.cli import app
from inc_clusterq.cpu import Cpu
from inc_clusterq.deployment.export import parity_inputs
from inc_clusterq.deployment.saved import SavedModel
from inc_clusterq.deployment.targets import TARGETS

SavedResult = Callable[..., SavedModel]


@pytest.fixture
def result(saved: SavedResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A copy of a result folder, that a test may damage."""
    monkeypatch.setenv("LOGLEVEL", "ERROR")
    monkeypatch.setenv("TORCH_LOGS", "-all")

    def make(name: str) -> Path:
        folder = tmp_path / "result"
        shutil.copytree(saved(name, 4).folder, folder, ignore=shutil.ignore_patterns("packed.safetensors"))
        return folder

    return make


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("to", ["inductor", "onnxruntime", "openvino"])
def test_an_export_reports_parity_and_every_operator_and_can_be_loaded(result: Callable[[str], Path], to: str) -> None:
    folder = result("residual")
    done = call("export", folder, "--to", to)
    assert done.exit_code == 0, done.output
    found = json.loads((folder / to / "export.json").read_text())
    assert found["target"] == to
    assert found["parity"]["in_range"] < 0.01
    assert len(found["operators"]) == 9
    assert sum(found["sizes"].values()) == sum(
        file.stat().st_size for file in (folder / to).iterdir() if file.name != "export.json"
    )
    assert TARGETS[to].load(folder / to)(torch.zeros(1, 3, 8, 8)).shape == (1, 5)
    assert "Against the evaluated model" in done.stdout

    again = call("export", folder, "--to", to)
    assert (again.exit_code, "--overwrite" in again.stderr) == (2, True)
    assert call("export", folder, "--to", to, "--overwrite", "--quiet").exit_code == 0


@pytest.mark.parametrize(("flags", "explained"), [({"avx2"}, True), ({"avx2", "avx512_vnni"}, False)])
def test_a_difference_is_explained_where_the_processor_overflows(
    result: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, flags: set[str], explained: bool
) -> None:
    folder = result("residual")
    monkeypatch.setattr("inc_clusterq.deployment.export.cpu", lambda: Cpu("the old one", "x86_64", frozenset(flags)))
    monkeypatch.setattr("inc_clusterq.deployment.export.weight_bits", lambda program: {"stem": 8})
    monkeypatch.setattr("inc_clusterq.deployment.export.kernel_arithmetic", lambda module: lambda x: module(x) + 1)
    done = call("export", folder, "--to", "onnxruntime")
    assert done.exit_code == 1, done.output
    assert "must not be deployed" in done.stderr
    assert ("the old one has neither VNNI nor AMX" in done.stderr) is explained
    assert not (folder / "onnxruntime").exists()


def test_strict_fails_and_writes_nothing_where_an_operator_is_in_float(result: Callable[[str], Path]) -> None:
    folder = result("transposed")
    before = {file.name for file in folder.iterdir()}
    done = call("export", folder, "--to", "onnxruntime", "--strict")
    assert done.exit_code == 1, done.output
    assert "up (convolution" in done.stderr
    assert {file.name for file in folder.iterdir()} == before
    assert call("export", folder, "--to", "onnxruntime").exit_code == 0


def test_strict_passes_where_everything_runs_in_int8(result: Callable[[str], Path]) -> None:
    folder = result("chain")
    done = call("export", folder, "--to", "onnxruntime", "--strict", "--output", folder.parent / "elsewhere")
    assert done.exit_code == 0, done.output
    assert (folder.parent / "elsewhere" / "model.onnx").is_file()


def damage_report(folder: Path) -> None:
    (folder / "result.json").write_text("{")


def other_version(folder: Path) -> None:
    report = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps({**report, "format": 99}))


def damage_program(folder: Path) -> None:
    file = folder / "quantized_weight.pt"
    file.write_bytes(file.read_bytes()[:1000])


def without_input(folder: Path) -> None:
    (folder / "result.json").write_text(json.dumps({"format": 1, "config": {}}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "there is no result folder"),
        (lambda folder: (folder / "result.json").unlink(), "holds no result.json"),
        (lambda folder: (folder / "quantized_weight.pt").unlink(), "has no quantized_weight.pt"),
        (damage_report, "is damaged"),
        (damage_program, "is damaged"),
        (without_input, "does not say what the model's input is"),
        (other_version, "has format 99 and this version reads format 1"),
    ],
)
def test_a_damaged_result_is_one_sentence_and_nothing_is_written(
    result: Callable[[str], Path], damage: Callable[[Path], None], message: str
) -> None:
    folder = result("chain")
    damage(folder)
    before = sorted(folder.rglob("*")) if folder.exists() else None
    done = call("export", folder, "--to", "onnxruntime")
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert "Traceback" not in done.output
    assert (sorted(folder.rglob("*")) if folder.exists() else None) == before


def test_an_unknown_target_is_answered_with_those_there_are(result: Callable[[str], Path]) -> None:
    done = call("export", result("chain"), "--to", "tensorrt")
    assert done.exit_code == 2
    assert "inductor, onnxruntime, openvino" in done.stderr


def test_a_folder_with_other_files_is_not_written_to(result: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    done = call("export", result("chain"), "--to", "inductor", "--output", tmp_path / "mine", "--overwrite")
    assert done.exit_code == 2
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_pack_prints_the_sizes_and_does_not_replace_without_being_asked(result: Callable[[str], Path]) -> None:
    folder = result("residual")
    done = call("pack", folder)
    assert done.exit_code == 0, done.output
    assert "packed.safetensors" in done.stdout
    assert (folder / "packed.safetensors").is_file()
    assert call("pack", folder).exit_code == 2
    assert call("pack", folder, "--overwrite").exit_code == 0


def test_images_of_the_check_have_the_contrast_of_the_calibration_twice_and_its_brightness(saved: SavedResult) -> None:
    model = saved("residual", 4)
    described = {"shape": list(model.shape), "range": [0, 255], "mean": [0], "std": [1]}
    bright = replace(model, report={"config": {"model": {"input": described}}}, program=deepcopy(model.program))
    examples = 120 + 20 * torch.rand(2, *model.shape, generator=torch.Generator().manual_seed(0))
    bright.program._example_inputs = ((examples,), {})
    images = parity_inputs(bright)
    assert float(images.mean()) == pytest.approx(float(examples.mean()), rel=1e-3)
    assert 0 < float(images.min()) < float(images.max()) < 255
    weights = torch.tensor([0.7, 0.3])
    single = float((2 * torch.einsum("n,n...->...", weights, examples)).std())
    assert float(images[0].std()) == pytest.approx(single, rel=0.2)
