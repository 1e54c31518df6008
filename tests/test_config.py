from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from inc_clusterq.config import Config, load_config
from inc_clusterq.errors import ConfigError
from inc_clusterq.inputs import InputSpec
from inc_clusterq.reconstruction.settings import ReconstructionSettings
from inc_clusterq.synthesis.settings import ClusterQSettings

MODEL = {"architecture": "python:nets:net", "input": {"shape": [3, 8, 8]}}


def write(folder: Path, text: str) -> Path:
    file = folder / "job.yaml"
    file.write_text(text)
    return file


def load(folder: Path, **keys: Any) -> Config:
    return load_config(write(folder, yaml.safe_dump({"model": MODEL, **keys})))


def complaint(folder: Path, **keys: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        load(folder, **keys)
    return str(raised.value)


def test_a_dump_is_the_same_config_again(tmp_path: Path) -> None:
    config = load(tmp_path, bits="W4A8", preset="fast")
    again = Config.model_validate(config.model_dump(by_alias=True))
    assert again.model_dump() == config.model_dump()


def test_three_keys_are_enough(tmp_path: Path) -> None:
    config = load(tmp_path, bits="W4A8", output="results")
    assert config.quantization.model_wise.weight.bits == 4
    assert config.quantization.model_wise.activation.bits == 8
    assert config.output == Path("results")
    assert config.model.input.spec() == InputSpec((3, 8, 8))
    assert config.tuning.random_seed == 1978  # the host's default


def test_without_any_width_everything_has_eight_bits(tmp_path: Path) -> None:
    widths = load(tmp_path).quantization.model_wise
    assert (widths.weight.bits, widths.activation.bits) == (8, 8)


def test_checkpoints_and_functions_are_relative_to_the_yaml_but_outputs_are_not(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        model={**MODEL, "weights": "nets/net.safetensors"},
        output="results",
        evaluation={"accuracy": {"dataset": "python:data:validation"}},
    )
    assert config.model.checkpoint == tmp_path / "nets" / "net.safetensors"
    assert config.model.folder == tmp_path
    assert config.evaluation.accuracy is not None
    assert config.evaluation.accuracy.folder == tmp_path
    assert (config.output, config.tuning.workspace.path) == (Path("results"), Path("nc_workspace"))


def test_the_home_folder_is_meant_by_its_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    places = {"output": "~/results", "tuning": {"workspace": {"path": "~/kept"}}}
    config = load(tmp_path, model={**MODEL, "weights": "~/net.pth"}, **places)
    assert config.model.checkpoint == tmp_path / "home" / "net.pth"
    assert (config.output, config.tuning.workspace.path) == (tmp_path / "home" / "results", tmp_path / "home" / "kept")
    with pytest.raises(ConfigError, match="the home folder of ~nobody-of-this-name/results is not known"):
        load(tmp_path, output="~nobody-of-this-name/results")


def test_published_weights_are_no_file(tmp_path: Path) -> None:
    model = {**MODEL, "architecture": "torchvision:resnet18", "weights": "DEFAULT"}
    assert load(tmp_path, model=model).model.checkpoint is None
    assert load(tmp_path, model={**model, "weights": "r18.pth"}).model.checkpoint == tmp_path / "r18.pth"


@pytest.mark.parametrize("preset", ["fast", "balanced", "best"])
def test_a_preset_sets_what_the_user_did_not(tmp_path: Path, preset: str) -> None:
    given = {"calibration": {"dataloader": {"dataset": {"ClusterQ": {"iterations": 7}}}}}
    quantization = load(tmp_path, preset=preset, quantization=given).quantization
    assert quantization.reconstruction == ReconstructionSettings(**ReconstructionSettings.PRESETS[preset])
    synthesis = quantization.calibration.dataloader.dataset.clusterq
    assert synthesis == ClusterQSettings(**{**ClusterQSettings.PRESETS[preset], "iterations": 7})


def test_a_preset_works_for_a_config_made_in_python() -> None:
    config = Config.model_validate({"model": MODEL, "preset": "fast"})
    assert config.quantization.reconstruction == ReconstructionSettings(**ReconstructionSettings.PRESETS["fast"])
    assert config.model.folder == Path.cwd()


def test_a_strategy_keeps_its_own_options(tmp_path: Path) -> None:
    strategy = load(tmp_path, tuning={"strategy": {"name": "other", "depth": 3}}).tuning.strategy
    assert (strategy.name, strategy.options) == ("other", {"depth": 3})


def test_single_layers_have_their_own_widths(tmp_path: Path) -> None:
    layers = load(tmp_path, quantization={"op_wise": {"layer1.0.conv1": {"weight": {"bits": 2}}}}).quantization.op_wise
    assert layers["layer1.0.conv1"].weight is not None
    assert layers["layer1.0.conv1"].weight.bits == 2
    assert layers["layer1.0.conv1"].activation is None


def test_kinds_of_layers_have_their_own_widths_and_other_kinds_are_errors(tmp_path: Path) -> None:
    kinds = load(tmp_path, quantization={"optype_wise": {"depthwise": {"weight": {"bits": 8}}}}).quantization.optype_wise
    assert kinds["depthwise"].weight is not None
    assert (kinds["depthwise"].weight.bits, kinds["depthwise"].activation) == (8, None)
    with pytest.raises(ConfigError, match=r"\"depthwis\" is not allowed; it should be 'dense', 'depthwise'"):
        load(tmp_path, quantization={"optype_wise": {"depthwis": {"weight": {"bits": 8}}}})


def test_one_number_normalises_all_channels(tmp_path: Path) -> None:
    given = {"shape": [3, 8, 8], "range": [0, 255], "mean": 127.5, "std": 64}
    found = load(tmp_path, model={**MODEL, "input": given}).model.input.spec()
    assert found == InputSpec((3, 8, 8), 0, 255, mean=(127.5,), std=(64.0,))


def test_override_replaces_output_and_seed_and_nothing_else(tmp_path: Path) -> None:
    config = load(tmp_path, output="one")
    changed = config.override(output=Path("two"), seed=5)
    assert (changed.output, changed.tuning.random_seed) == (Path("two"), 5)
    assert changed.override(output=Path("one"), seed=1978) == config == config.override()


def test_a_config_cannot_be_changed(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load(tmp_path).output = Path("elsewhere")  # type: ignore[misc]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"bit": "W4A8"}, "line 1: bit: unknown key; did you mean 'bits'?"),
        ({"max_trials": 3}, "max_trials: unknown key; did you mean 'tuning.exit_policy.max_trials'?"),
        (
            {"iterations": 5},
            "iterations: unknown key; did you mean 'quantization.calibration.dataloader.dataset.ClusterQ.iterations' or "
            "'quantization.reconstruction.iterations'?",
        ),
        (
            {"quantization": {"reconstruction": {"iteratons": 3}}},
            "reconstruction.iteratons: unknown key; did you mean 'quantization.reconstruction.iterations'?",
        ),
        (
            {"quantization": {"op_wise": {"layer1.0": {"weights": {"bits": 8}}}}},
            "quantization.op_wise.layer1.0.weights: unknown key; did you mean 'quantization.op_wise.layer1.0.weight'?",
        ),
        (
            {"quantization": {"calibration": {"dataloader": {"dataset": {"ImageFolder": {}}}}}},
            "dataset.ImageFolder: unknown key; known keys here: ClusterQ",
        ),
        ({"bits": "W4"}, 'bits: "W4" is not allowed; it should look like "W4A8" or "W8A8"'),
        ({"bits": "int8"}, 'bits: "int8" is not allowed; it should look like "W4A8" or "W8A8"'),
        ({"bits": "W9A8"}, 'bits: "W9A8" is not allowed'),
        ({"bits": 8}, 'bits: 8 is not allowed; it should look like "W4A8" or "W8A8"'),
        ({"quantization": {"reduce_range": 1}}, "reduce_range: 1 is not allowed; it should be a valid boolean or 'auto'"),
        (
            {"quantization": {"optype_wise": {"conv": {"weight": {"bits": 4}}}}},
            "optype_wise.conv: \"conv\" is not allowed; it should be 'dense', 'depthwise', 'grouped' or 'linear'",
        ),
        (
            {"quantization": {"calibration": {"dataloader": {"dataset": {"ClusterQ": {"betas": [0.5]}}}}}},
            "dataset.ClusterQ.betas: has too few values",
        ),
        (
            {"quantization": {"reconstruction": {"granularity": "explicit", "explicit_units": [["a", 1]]}}},
            "explicit_units.0.1: 1 is not allowed; it should be a valid string",
        ),
        ({"preset": "quick"}, "preset: \"quick\" is not allowed; it should be 'fast', 'balanced' or 'best'"),
        (
            {"quantization": {"model_wise": {"weight": {"bits": 9}}}},
            "quantization.model_wise.weight.bits: 9 is not allowed; it should be less than or equal to 8",
        ),
        (
            {"bits": "W4A8", "quantization": {"model_wise": {"weight": {"bits": 3}}}},
            "`bits` and `quantization.model_wise` are both given and differ",
        ),
        ({"tuning": {"exit_policy": {"max_trials": True}}}, "true is not allowed; it should be a valid integer"),
        ({"tuning": {"exit_policy": {"max_trials": "3"}}}, '"3" is not allowed; it should be a valid integer'),
        ({"tuning": {"workspace": None}}, "tuning.workspace: is empty; give it keys or delete it"),
        ({"tuning": {"workspace": "here"}}, 'tuning.workspace: "here" is not a mapping of keys to values'),
        ({"tuning": {"strategy": {"name": ""}}}, 'tuning.strategy.name: "" is not allowed'),
        (
            {"tuning": {"accuracy_criterion": {"relative": float("nan")}}},
            "accuracy_criterion.relative: NaN is not",
        ),
        ({"evaluation": {"accuracy": {"dataset": "data.validation"}}}, 'dataset: "data.validation" is not allowed'),
        (
            {"model": {"architecture": "python:nets:net"}},
            "model.input: is missing; What the model expects",
        ),
        (
            {"model": {**MODEL, "architecture": "resnet18"}},
            "it must read torchvision:NAME or python:package",
        ),
        (
            {"model": {**MODEL, "input": {"shape": [3, 8, 8], "range": [1, 0]}}},
            "model.input: range is [1, 0]; it must",
        ),
        ({"model": {**MODEL, "input": {"shape": [3.5]}}}, "model.input.shape.0: 3.5 is not allowed"),
        ({"model": {**MODEL, "input": {"shape": 77}}}, "model.input.shape: 77 is not allowed; it should be a list"),
        (
            {"model": {**MODEL, "input": {"shape": [3], "mean": "127"}}},
            'model.input.mean: must be a number or a list of numbers (it is "127")',
        ),
        (
            {"model": {**MODEL, "input": {"shape": [3], "mean": True}}},
            "model.input.mean: must be a number or a list of numbers (it is true)",
        ),
        ({"model": {**MODEL, "input": {"shape": [3], "std": [1, "a", 1]}}}, 'model.input.std.1: "a" is not allowed'),
    ],
)
def test_each_mistake_is_named_with_key_value_and_remedy(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    assert message in complaint(tmp_path, **keys)


def test_all_mistakes_of_a_file_are_listed_by_line(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "bits: W1A8\nmodel:\n  architecture: python:nets:net\n  input: {shape: [1], rnage: [0, 1]}\ntuning:\n"
        "  random_seed: -1\n",
    )
    with pytest.raises(ConfigError) as raised:
        load_config(file)
    first, *rest = str(raised.value).splitlines()
    assert first == f"{file} has 3 problems:"
    assert [line.strip().split(":")[:2] for line in rest] == [
        ["line 1", " bits"],
        ["line 4", " model.input.rnage"],
        ["line 6", " tuning.random_seed"],
    ]
