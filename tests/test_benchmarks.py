from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


def run(root: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "benchmarks" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def module(root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """One that the benchmark scripts share, by name; the scripts are no package."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    return importlib.import_module


def test_the_error_of_outputs_is_in_units_of_their_variance(module: Callable[[str], Any]) -> None:
    measuring = module("measuring")
    plain, shifted = torch.nn.Linear(1, 2), torch.nn.Linear(1, 2)
    with torch.no_grad():
        for layer, bias in ((plain, [0.0, 0.0]), (shifted, [3.0, 1.0])):
            layer.weight.copy_(torch.tensor([[1.0], [2.0]]))
            layer.bias.copy_(torch.tensor(bias))
    inputs = torch.tensor([[-1.0], [1.0]])  # outputs vary by 1 and 4, and are off by 3 and 1
    assert measuring.output_error(shifted, plain, inputs, batch=1) == pytest.approx((9 + 1) / (1 + 4))
    assert measuring.output_error(plain, plain, inputs) == 0


def test_images_that_judge_outputs_have_not_calibrated(module: Callable[[str], Any]) -> None:
    subjects, options_of = module("subjects"), module("arguments").Options
    training, options = torch.arange(10.0), options_of(Path(), ("net",), ((4, 4),), (3,), None, "fast", None, images=6)
    drawn, rest = subjects.real(training, options, seed=3), subjects.unseen(training, options, seed=3)
    assert sorted([*drawn.tolist(), *rest.tolist()]) == training.tolist()
    assert len(rest) == 4
    assert subjects.unseen(training[:6], options, seed=3) is None
    assert subjects.unseen(None, options, seed=3) is None


def test_the_tables_of_the_docs_are_what_the_recorded_figures_say(root: Path) -> None:
    assert run(root, "tables.py", "--check").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "nowhere"), "must name a folder that holds load.py"),
        (("--data", "{data}", "--widths", "W4B8"), "'W4B8' is not a width"),
        (("--data", "{data}", "--seeds", "one"), "invalid literal"),
    ],
)
def test_a_wrong_argument_is_named(
    module: Callable[[str], Any],
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "load.py").write_text("")
    monkeypatch.setattr(sys, "argv", ["accuracy.py", *(argument.format(data=tmp_path) for argument in arguments)])
    with pytest.raises(SystemExit) as stopped:
        module("arguments").parse("a benchmark", nets="mine")
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_input_specification_is_read_off_the_normalisation(module: Callable[[str], Any]) -> None:
    mean, std = torch.tensor([10.0, 20.0, 30.0]), torch.tensor([2.0, 4.0, 8.0])
    shape = (1, 3, 1, 1)
    spec = module("subjects").input_spec(
        lambda x: (x - mean.view(shape)) / std.view(shape), torch.zeros(1, 3, 32, 32), is_image=True
    )
    assert (spec.shape, spec.low, spec.high) == ((3, 32, 32), 0, 255)
    assert spec.mean == pytest.approx(tuple(mean.tolist()))
    assert spec.std == pytest.approx(tuple(std.tolist()))


LOAD = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )
    with torch.no_grad():
        for _ in range(5):
            net.train()(torch.randn(64, 3, 32, 32))
    return net.eval()

MODELS = {"mine": None}
def norm(x): return x / 127.5 - 1
def model(name): return make(), norm, 32
def cifar(split="test_first5000"):
    count = 300 if split == "train_first2048" else 60
    x = torch.randint(0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(count)).float()
    with torch.no_grad():
        return x, make()(norm(x)).argmax(1)
"""


@pytest.mark.slow
def test_the_reconstruction_benchmark_measures_every_method(root: Path, tmp_path: Path) -> None:
    (tmp_path / "load.py").write_text(LOAD)
    figures = tmp_path / "figures.json"
    options = ("--nets", "mine", "--widths", "W4A4", "--seeds", "0", "--preset", "fast", "--json", str(figures))
    done = run(root, "reconstruction.py", "--data", str(tmp_path), *options, "--images", "20")
    assert done.returncode == 0, done.stderr
    measured = json.loads(figures.read_text())["nets"]["mine"]["widths"]["W4A4"]
    assert list(measured) == ["nearest", "AdaRound", "BRECQ", "QDrop", "MRECG ModCap", "MRECG loss", "ours"]
    assert all(len(values[measure]) == 1 for values in measured.values() for measure in values)


@pytest.mark.slow
def test_a_network_with_a_single_unit_below_8_bits_has_one_way_to_raise_it(root: Path, tmp_path: Path) -> None:
    (tmp_path / "load.py").write_text(LOAD)
    figures = tmp_path / "figures.json"
    options = ("--nets", "mine", "--widths", "W3A3", "--seeds", "0", "--preset", "fast", "--json", str(figures))
    methods = ("--methods", "ours,ours 1 raised,ours 1 by loss")
    done = run(root, "reconstruction.py", "--data", str(tmp_path), *options, "--images", "20", *methods)
    assert done.returncode == 0, done.stderr
    measured = json.loads(figures.read_text())["nets"]["mine"]["widths"]["W3A3"]
    as_it_is, raised, by_loss = ([values[measure][0] for measure in ("top1", "output_error")] for values in measured.values())
    assert raised == by_loss
    assert raised[1] < as_it_is[1] / 10


@pytest.mark.slow
def test_a_continued_record_keeps_what_it_has_and_measures_the_rest(root: Path, tmp_path: Path) -> None:
    (tmp_path / "load.py").write_text(LOAD)
    figures = tmp_path / "figures.json"
    options = ("--nets", "mine", "--widths", "W4A4", "--preset", "fast", "--json", str(figures), "--images", "20")

    def measured(seeds: str, methods: str, *more: str) -> dict[str, dict[str, list[float]]]:
        asked = ("--data", str(tmp_path), *options, "--synthetic", "--seeds", seeds, "--methods", methods)
        done = run(root, "reconstruction.py", *asked, *more)
        assert done.returncode == 0, done.stderr
        found: dict[str, dict[str, list[float]]] = json.loads(figures.read_text())["nets"]["mine"]["widths"]["W4A4"]
        return found

    first = measured("0", "nearest")
    both = measured("0,1", "nearest,BRECQ", "--continue")
    assert both["nearest"]["seconds"][0] == first["nearest"]["seconds"][0]  # a second run would take another time
    assert [len(values["top1"]) for values in both.values()] == [2, 2]
    assert "--seeds 0,1" in json.loads(figures.read_text())["command"]
    part = measured("0", "BRECQ", "--continue")  # nothing is left to measure
    assert part == {"BRECQ": {measure: values[:1] for measure, values in both["BRECQ"].items()}}
    refused = run(root, "reconstruction.py", "--data", str(tmp_path), *options, "--limit", "30", "--continue")
    assert "can't be continued: its limit is None, and now it is 30" in refused.stderr
    assert refused.returncode == 1


@pytest.mark.slow
def test_the_accuracy_benchmark_measures_other_networks_through_the_interface_alone(root: Path, tmp_path: Path) -> None:
    (tmp_path / "load.py").write_text(LOAD)
    figures = tmp_path / "figures.json"
    options = ("--nets", "mine", "--widths", "W8A8", "--seeds", "0", "--preset", "fast", "--json", str(figures))
    done = run(root, "accuracy.py", "--data", str(tmp_path), *options)
    assert done.returncode == 0, done.stderr
    assert "ours, no data" in done.stdout
    assert '"float": 100.0' in figures.read_text()


@pytest.mark.slow
def test_a_record_whose_sets_were_kept_is_continued_where_none_is(root: Path, tmp_path: Path) -> None:
    # Such a record has no seconds of the synthesis: a set that is found takes none.
    (tmp_path / "load.py").write_text(LOAD)
    figures = tmp_path / "figures.json"
    options = ("--nets", "mine", "--widths", "W4A4", "--preset", "fast", "--json", str(figures))
    for more in (("--seeds", "0", "--workspace", str(tmp_path / "sets")), ("--seeds", "0,1", "--continue")):
        done = run(root, "accuracy.py", "--data", str(tmp_path), *options, *more)
        assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())["top1"]["mine"]
    assert len(found["top1"]["W4A4"]["ours, no data"]) == 2
    assert found["synthesis_seconds"] == []


@pytest.mark.slow
def test_the_synthesis_benchmark_gives_every_source_as_many_images(root: Path, tmp_path: Path) -> None:
    (tmp_path / "load.py").write_text(LOAD)
    figures = tmp_path / "figures.json"
    sources = "noise,statistics,latent+alignment,real"
    options = ("--nets", "mine", "--widths", "W4A4", "--seeds", "0", "--preset", "fast", "--json", str(figures))
    done = run(root, "synthesis.py", "--data", str(tmp_path), *options, "--sources", sources, "--images", "20")
    assert done.returncode == 0, done.stderr
    record = json.loads(figures.read_text())
    assert record["images"] == 20
    assert f"--sources {sources} --images 20" in record["command"]
    found = record["synthesis"]["mine"]["sources"]
    assert list(found) == sources.split(",")
    figures_of = [entry[figure] for entry in found.values() for figure in ("top1", "output_error")]
    assert all(len(values[width]) == 1 for values in figures_of for width in ("INC W8A8", "W4A4"))
    assert all(0 < entry["output_error"]["INC W8A8"][0] < entry["output_error"]["W4A4"][0] for entry in found.values())
    assert found["noise"]["seconds"] == []
    assert found["statistics"]["peak_mb"][0] > 100
    assert found["statistics"]["quality"][0]["statistics_distance"] < found["noise"]["quality"][0]["statistics_distance"]


@pytest.mark.slow
def test_the_cost_of_a_preset_is_measured_and_becomes_a_table(root: Path, tmp_path: Path, module: Callable[[str], Any]) -> None:
    (tmp_path / "load.py").write_text(LOAD)
    figures = tmp_path / "figures.json"
    options = ("--nets", "mine", "--presets", "fast", "--images", "20", "--json", str(figures))
    done = run(root, "presets.py", "--data", str(tmp_path), *options)
    assert done.returncode == 0, done.stderr
    record = json.loads(figures.read_text())
    costs = record["presets"]["mine"]["fast"]
    assert [len(costs[cost]) for cost in ("seconds", "peak_mb", "start_mb")] == [1, 1, 1]
    assert costs["start_mb"][0] < costs["peak_mb"][0]
    assert "--widths" not in record["command"]
    assert "preset" not in record
    lines = module("synthesis_table").sections([], presets=[record]).splitlines()
    assert f"| mine | fast | {costs['seconds'][0]:.0f} | {costs['peak_mb'][0]:.0f} |" in lines


@pytest.mark.slow
def test_the_teacher_benchmark_times_every_way_and_its_record_becomes_a_table(
    root: Path, tmp_path: Path, module: Callable[[str], Any]
) -> None:
    figures = tmp_path / "figures.json"
    options = ("--images", "2", "--size", "64", "--steps", "1", "--rounds", "3", "--json", str(figures))
    done = run(root, "teacher.py", "--nets", "shufflenet_v2_x0_5", *options)
    assert done.returncode == 0, done.stderr
    record = json.loads(figures.read_text())
    found = record["nets"]["shufflenet_v2_x0_5"]
    assert {way: len(times) for way, times in found["milliseconds"].items()} == {
        f"{way}{more}".removeprefix("plain, "): 3
        for way in ("plain", "channels last", "compiled")
        for more in ("", ", bfloat16")
    }
    lines = module("synthesis_table").sections([], teachers=[record]).splitlines()
    assert "2 images of 64 pixels; weights are random." in lines
    assert len([line for line in lines if line.startswith("| shufflenet_v2_x0_5 | ")]) == 1
    refused = run(root, "teacher.py", "--nets", "shufflenet")
    assert refused.returncode == 2
    assert "torchvision has no network 'shufflenet'" in refused.stderr


@pytest.mark.slow
def test_the_benchmark_of_the_pass_end_to_end_times_every_way_and_its_record_becomes_a_table(
    root: Path, tmp_path: Path, module: Callable[[str], Any]
) -> None:
    figures = tmp_path / "figures.json"
    done = run(root, "whole_step.py", "--nets", "shufflenet_v2_x0_5", "--size", "64", "--rounds", "2", "--json", str(figures))
    assert done.returncode == 0, done.stderr
    record = json.loads(figures.read_text())
    found = record["milliseconds"]["shufflenet_v2_x0_5"]
    assert [(way, len(times)) for way, times in found.items()] == [
        (way, 2) for way in ("autograd", "channels last", "from outputs", "ours")
    ]
    lines = module("tables").steps(record).splitlines()
    assert lines[0] == "## Milliseconds of a step of the pass end to end"
    assert len([line for line in lines if line.startswith("| shufflenet_v2_x0_5 | ")]) == 1
    refused = run(root, "whole_step.py", "--nets", "shufflenet")
    assert refused.returncode == 2
    assert "torchvision has no network 'shufflenet'" in refused.stderr


@pytest.mark.slow
def test_the_memory_benchmark_measures_any_network_of_torchvision(root: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    options = ("--images", "16", "--size", "64", "--iterations", "1", "--budget", "0", "--json", str(figures))
    done = run(root, "memory.py", "--net", "shufflenet_v2_x0_5", *options)
    assert done.returncode == 0, done.stderr
    record = json.loads(figures.read_text())
    assert record["images_mb"] == 16 * 3 * 64 * 64 * 4 / 2**20
    assert record["images_mb"] < record["private_mb"] < record["resident_mb"]
    refused = run(root, "memory.py", "--net", "shufflenet")
    assert refused.returncode == 2
    assert "torchvision has no network 'shufflenet'" in refused.stderr


def source(top1: list[float]) -> dict[str, Any]:
    quality = [{"statistics_distance": 0.012, "diversity": 4.0} for _ in top1]
    return {"top1": {"INC W8A8": top1, "W4A4": []}, "seconds": [50.0, 52.0], "peak_mb": [900.4], "quality": quality}


def record(images: int, sources: dict[str, list[float]]) -> dict[str, Any]:
    return {
        "command": f"python benchmarks/synthesis.py --images {images}",
        "preset": "fast",
        "seeds": [0, 1],
        "environment": {"torch": "2"},
        "images": images,
        "synthesis": {"net": {"float": 91.5, "splits": "s", "sources": {name: source(top1) for name, top1 in sources.items()}}},
    }


def test_sources_parts_and_numbers_of_images_have_tables_of_their_own(module: Callable[[str], Any]) -> None:
    table = module("synthesis_table")
    usual = record(256, {"noise": [80.0, 82.0], "latent+alignment": [90.0]})
    lines = table.sections([usual]).splitlines()
    assert [line for line in lines if line.startswith("#")] == ["### Sources", "#### net, float 91.50"]
    assert "| noise | 81.00 ± 1.41 | - | 51 ± 1 | 900 | 0.012 ± 0.000 | 4.0 ± 0.0 |" in lines
    assert "`python benchmarks/synthesis.py --images 256`" in lines
    assert "| source | INC W8A8 | W4A4 | seconds | peak MB | distance | diversity |" in lines
    for found in usual["synthesis"]["net"]["sources"].values():
        found["output_error"] = {"INC W8A8": [0.001, 0.003], "W4A4": []}
    lines = table.sections([usual]).splitlines()
    assert "| source | INC W8A8 | W4A4 | INC W8A8 error | seconds | peak MB | distance | diversity |" in lines
    assert "| noise | 81.00 ± 1.41 | - | 0.002 ± 0.001 | 51 ± 1 | 900 | 0.012 ± 0.000 | 4.0 ± 0.0 |" in lines
    lines = table.sections([usual, record(256, {"clusterq-prior": [89.0]}), record(64, {"noise": [70.0]})]).splitlines()
    titles = ["### Sources", "### Without one part", "### Numbers of images"]
    assert [line for line in lines if line.startswith("### ")] == titles
    assert lines.index("| net | noise | 64 | 70.00 | - |") + 1 == lines.index("| net | noise | 256 | 81.00 ± 1.41 | - |")
    assert not [line for line in lines[: lines.index(titles[1])] if "clusterq-prior" in line]
    assert not [line for line in lines if line.startswith("| net | latent+alignment")]


def test_a_record_that_was_cut_off_has_figures_that_not_every_seed_has(module: Callable[[str], Any]) -> None:
    page = module("page")
    entry: dict[str, Any] = {
        "seconds": [1.0, 2.0],
        "quality": [{"diversity": 4.0}, {"diversity": 5.0}],
        "top1": {"W4A4": [89.0, 90.0], "W2A4": []},
    }
    whole = {"seeds": [0, 1], "environment": {"torch": "2"}, "synthesis": {"net": {"float": 91.5, "noise": entry}}}
    assert page.unfinished(whole) == []
    entry["in_float"] = ["one: not fused", "other: not fused", "third: not fused"]  # names, and not of seeds
    assert page.unfinished(whole) == []
    entry["top1"]["W2A4"].append(80.0)
    assert page.unfinished(whole) == ["synthesis / net / noise / top1 / W2A4"]


def test_seeds_of_several_machines_are_told_apart_in_words(module: Callable[[str], Any]) -> None:
    page = module("page")
    one, other = {"processor": "A", "processors": "2"}, {"processor": "B", "processors": "4"}
    whole = {"seeds": [0, 1, 5], "environment": {"torch": "2", "threads": "1"}, "machines": [one, other, one]}
    words = "torch 2, threads 1; seeds 0, 5 on processor A, processors 2; seeds 1 on processor B, processors 4"
    assert page.environment(whole) == words
    assert page.environment({"environment": {"torch": "2", **one}}) == "torch 2, processor A, processors 2"


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (
            "synthesis.py",
            ("--sources", "noise,clusterk"),
            "'clusterk' is not a source; there are noise, real, statistics, clusterq",
        ),
        ("reconstruction.py", ("--methods", "QDropp"), "'QDropp' is not a method; there are nearest, AdaRound, BRECQ"),
    ],
)
def test_what_is_not_compared_is_answered_with_what_is(
    root: Path, tmp_path: Path, script: str, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "load.py").write_text("")
    done = run(root, script, "--data", str(tmp_path), *arguments)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
