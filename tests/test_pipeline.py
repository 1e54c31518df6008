from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from torch._inductor.exc import InvalidCxxCompiler
from typer.testing import CliRunner, Result

from inc_clusterq.cli import app
from inc_clusterq.errors import DeploymentError
from inc_clusterq.strategies.mrecg import MRECGStrategy

NETS = """
    import torch
    from torch import nn

    CLASSES = 3

    class Separable(nn.Module):
        # odd on purpose: a state of its own, one channel, not square, depthwise, a residual, two branches that are concatenated
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
            self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
            self.pointwise = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))
            self.left = nn.Sequential(nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU())
            self.right = nn.Sequential(nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Hardswish())
            self.head = nn.Linear(12, CLASSES)

        def get_extra_state(self):  # in the state beside the tensors
            return {"epochs": 20}

        def set_extra_state(self, state):
            pass

        def forward(self, x):
            x = self.stem(x)
            x = x + self.pointwise(self.depthwise(x))
            x = torch.cat([self.left(x), self.right(x)], 1)
            return self.head(x.mean((2, 3)))

    def settled(net):
        # running statistics of something, and outputs that spread over the classes
        with torch.no_grad():
            net.train()
            for _ in range(20):
                net(torch.rand(64, 1, 14, 10))
        return net.eval()

    def net():
        torch.manual_seed(0)
        return settled(Separable())

    def without_batch_norm():
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 12 * 8, CLASSES))

    def features():
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))

    class Branching(Separable):
        def forward(self, x):
            if x.sum() > 0:
                return super().forward(x)
            return super().forward(-x)

    def branching():
        return Branching()

    def labelled():
        x = torch.rand(90, 1, 14, 10, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            return x, net()(x).argmax(1)

    def all_wrong():
        x, y = labelled()
        return x, (y + 1) % CLASSES
"""

JOB = """
    model:
      architecture: "python:{module}:{function}"
      input: {{shape: [1, 14, 10]}}
    bits: {bits}
    preset: fast
    quantization:
      calibration:
        sampling_size: 32
        dataloader: {{batch_size: 12, dataset: {{ClusterQ: {{iterations: 4, warmup_iterations: 2, refine_iterations: 4}}}}}}
      reconstruction: {{iterations: 8}}
    evaluation: {evaluation}
    tuning: {{accuracy_criterion: {{relative: {relative}}}, exit_policy: {{max_trials: 2}}, strategy: {strategy}}}
"""


# Weights of the five convolutions; weight, bias, mean, variance (4 bytes) and count (8) of the BatchNorms; the linear layer.
BYTES = 4 * (8 * 9 + 8 * 9 + 8 * 8 + 2 * 6 * 8 * 9) + 3 * (4 * 4 * 8 + 8) + 2 * (4 * 4 * 6 + 8) + 4 * (12 * 3 + 3)


class Bench:
    """A folder with a user's module, in which jobs are run by the command line."""

    def __init__(self, folder: Path, module: str) -> None:
        self.folder, self.module = folder, module

    def run(self, *arguments: str, **keys: str) -> Result:
        settings = {"function": "net", "bits": "W4A4", "evaluation": "{held_out: 24}", "relative": "0.0", "strategy": "{}"}
        text = dedent(JOB).format(module=self.module, **{**settings, **keys})
        (self.folder / "job.yaml").write_text(text)
        return CliRunner().invoke(app, ["quantize", str(self.folder / "job.yaml"), *arguments])

    def left_behind(self) -> set[str]:
        """Names in the folder besides the user's own; the workspace is meant to stay."""
        own = {"job.yaml", f"{self.module}.py", "__pycache__", "nc_workspace"}
        return {path.name for path in self.folder.iterdir()} - own


@pytest.fixture
def bench(tmp_path: Path, write_module: object, monkeypatch: pytest.MonkeyPatch) -> Bench:
    assert callable(write_module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOGLEVEL", "ERROR")
    monkeypatch.setenv("TORCH_LOGS", "-all")
    return Bench(tmp_path, write_module(NETS))


def outputs_in_plain_host(folder: Path, inputs: Path) -> torch.Tensor:
    """What a machine computes that has the host and not this package."""
    code = f"""
        import sys, torch
        from neural_compressor.torch.quantization import load
        model = load({str(folder)!r})
        with torch.no_grad():
            torch.save(model(torch.load({str(inputs)!r}, weights_only=True)), {str(inputs.with_suffix(".out"))!r})
        assert not any(name.startswith("inc_clusterq") for name in sys.modules)
    """
    subprocess.run([sys.executable, "-c", dedent(code)], check=True, capture_output=True)
    found: torch.Tensor = torch.load(inputs.with_suffix(".out"), weights_only=True)
    return found


def test_a_job_without_data_saves_a_model_that_the_plain_host_runs(bench: Bench) -> None:
    result = bench.run()
    assert result.exit_code == 0, result.output
    assert "agreement on 24 held-out synthetic images" in result.stdout
    found = json.loads((bench.folder / "saved_results" / "result.json").read_text())
    assert [row["name"] for row in found["models"]] == ["float", "INC static, noise", "inc-clusterq"]
    assert found["models"][0]["score"] == 1
    assert found["met_goal"] == (found["models"][2]["score"] >= found["goal"])
    assert found["parity"]["agreement"] == 1
    assert found["models"][0]["size"] == BYTES
    assert found["config"]["quantization"]["reduce_range"] in (True, False)  # as decided
    assert found["reconstruction"]["views"] == 1
    assert found["synthetic"]["layers"][0]["name"] == "stem.1"
    assert "Synthetic set: " in result.stdout
    assert {path.name for path in (bench.folder / "saved_results").iterdir()} == {
        "losses.png",
        "result.json",
        "qconfig.json",
        "quantized_weight.pt",
    }
    inputs = bench.folder / "inputs.pt"
    torch.save(torch.rand(5, 1, 14, 10), inputs)
    assert outputs_in_plain_host(bench.folder / "saved_results", inputs).shape == (5, 3)

    # again: refused, then replaced; the work is taken from the workspace and the model is the same to the bit
    before = outputs_in_plain_host(bench.folder / "saved_results", inputs)
    assert bench.run().exit_code == 2
    again = bench.run("--overwrite")
    assert again.exit_code == 0, again.output
    repeated = json.loads((bench.folder / "saved_results" / "result.json").read_text())
    assert all(unit["resumed"] for unit in repeated["reconstruction"]["units"])
    assert torch.equal(outputs_in_plain_host(bench.folder / "saved_results", inputs), before)
    assert bench.left_behind() == {"saved_results", "inputs.pt", "inputs.out"}


def test_a_labelled_set_scores_the_trials_and_the_table_says_so(bench: Bench) -> None:
    evaluation = f'{{accuracy: {{dataset: "python:{bench.module}:labelled"}}}}'
    result = bench.run(evaluation=evaluation, bits="W8A8", relative="0.5")
    assert result.exit_code == 0, result.output
    assert "accuracy on 90 labelled images" in result.stdout
    found = json.loads((bench.folder / "saved_results" / "result.json").read_text())
    assert found["metric"] == "accuracy"
    assert found["models"][0]["score"] == 1
    assert found["best_trial"] == "modcap"
    assert found["met_goal"] is True


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"function": "without_batch_norm"}, "BatchNorm"),
        ({"function": "features"}, "class logits"),
        ({"function": "branching"}, "cannot be exported"),
        ({"function": "nett"}, "did you mean 'net'?"),
        ({"bits": "W4A9"}, "bits"),
        ({"strategy": "{name: mrecgg}"}, "did you mean 'mrecg'?"),
        ({"strategy": "{name: mrecg, depth: 3}"}, "no option depth; it has none"),
        ({"evaluation": '{accuracy: {dataset: "python:nowhere:labelled"}}'}, "no module 'nowhere'"),
        ({"relative": "2"}, "relative"),
    ],
)
def test_a_mistake_is_one_sentence_with_status_2_and_leaves_nothing(bench: Bench, keys: dict[str, str], message: str) -> None:
    result = bench.run(**keys)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert bench.left_behind() == set()


def test_labels_that_the_float_model_never_predicts_are_refused(bench: Bench) -> None:
    result = bench.run(evaluation=f'{{accuracy: {{dataset: "python:{bench.module}:all_wrong"}}}}')
    assert (result.exit_code, bench.left_behind()) == (2, set())
    assert "predicts none of the 90 labels" in result.stderr


def test_an_unknown_layer_in_op_wise_names_those_there_are(bench: Bench) -> None:
    text = (
        dedent(JOB)
        .format(module=bench.module, function="net", bits="W4A4", evaluation="{held_out: 24}", relative="0", strategy="{}")
        .replace("quantization:", "quantization:\n  op_wise: {stem.9: {weight: {bits: 8}}}")
    )
    (bench.folder / "job.yaml").write_text(text)
    result = CliRunner().invoke(app, ["quantize", str(bench.folder / "job.yaml")])
    assert result.exit_code == 2, result.output
    assert "stem.9" in result.stderr
    assert "did you mean stem.0" in result.stderr
    assert bench.left_behind() == set()
    assert not (bench.folder / "nc_workspace").exists()  # it is told before the synthesis


@pytest.mark.parametrize("kind", ["file", "foreign folder"])
def test_an_output_that_cannot_be_used_is_refused_before_any_work(bench: Bench, kind: str) -> None:
    output = bench.folder / "saved_results"
    if kind == "file":
        output.write_text("mine")
    else:
        output.mkdir()
        (output / "thesis.tex").write_text("mine")
    result = bench.run("--overwrite")
    assert result.exit_code == 2, result.output
    assert not (bench.folder / "nc_workspace").exists()
    assert output.read_text() == "mine" if kind == "file" else (output / "thesis.tex").read_text() == "mine"


def test_a_workspace_inside_the_output_is_refused_before_any_work(bench: Bench) -> None:
    by_quantize = bench.run("--output", "nc_workspace")
    by_synthesize = CliRunner().invoke(app, ["synthesize", "job.yaml", "--output", "nc_workspace"])
    for result in (by_quantize, by_synthesize):
        assert result.exit_code == 2, result.output
        assert "lies in it; name another for one of them" in result.stderr
    assert not (bench.folder / "nc_workspace").exists()


def test_a_model_that_computes_something_else_once_compiled_is_not_saved(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("pipeline", "deployment.inductor_operators"):
        monkeypatch.setattr(f"inc_clusterq.{module}.compile_frozen", lambda module, example: lambda x: module(x) + 1)
    result = bench.run()
    assert result.exit_code == 1
    assert "must not be deployed" in result.stderr
    assert bench.left_behind() == set()


def test_what_is_there_for_comparison_may_fail_to_compile(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(module: torch.nn.Module, example: torch.Tensor) -> None:
        raise DeploymentError("the model cannot be compiled: it is odd")

    monkeypatch.setattr("inc_clusterq.pipeline.compile_frozen", fail)
    result = bench.run()
    assert result.exit_code == 0, result.output
    found = json.loads((bench.folder / "saved_results" / "result.json").read_text())
    float_model, static, ours = (row["latency"] for row in found["models"])
    assert float_model is static is None
    assert ours["median"] > 0
    assert "Of the model 'float' no latency is measured: the model cannot be compiled: it is odd" in caplog.text


def test_what_is_there_for_comparison_may_fail_to_be_quantized(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: object, exported: object, calibration: object) -> None:
        raise AssertionError("min nan should be less than max nan")

    monkeypatch.setattr("inc_clusterq.adaptors.neural_compressor.NeuralCompressorAdaptor.quantize_static", fail)
    result = bench.run()
    assert result.exit_code == 0, result.output
    found = json.loads((bench.folder / "saved_results" / "result.json").read_text())
    assert [row["name"] for row in found["models"]] == ["float", "inc-clusterq"]
    assert "'INC static, noise' fails and is not compared: AssertionError: min nan" in caplog.text


def test_a_strategy_of_the_users_own_may_take_any_option(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, object]] = []

    def make(**options: object) -> MRECGStrategy:
        given.append(options)
        raise ValueError("seen")

    monkeypatch.setattr("inc_clusterq.pipeline.find", lambda group, name: make)
    assert "does not take these options: seen" in bench.run(strategy="{name: theirs, depth: 3}").stderr
    assert given == [{"depth": 3}]


def test_a_machine_without_a_compiler_is_told_before_any_work(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr("inc_clusterq.deployment.inductor.get_cpp_compiler", none)
    result = bench.run()
    assert result.exit_code == 1
    assert "Inductor needs one, for example g++, on the path" in " ".join(result.stderr.split())
    assert not (bench.folder / "nc_workspace").exists()


def test_strict_refuses_a_model_with_an_operator_in_float_and_writes_nothing(bench: Bench) -> None:
    result = bench.run("--strict")
    assert result.exit_code == 1, result.output
    assert "head (linear" in result.stderr  # 12 inputs: Inductor computes so few in a loop of its own
    assert bench.left_behind() == set()
