from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from neural_compressor.torch.export import export
from neural_compressor.torch.quantization import TuningConfig, autotune, quantize
from torch import Tensor, nn

from inc_clusterq.adaptors.neural_compressor import NeuralCompressorAdaptor
from inc_clusterq.adaptors.neural_compressor_config import MRECGConfig
from inc_clusterq.errors import ClusterQError, ModelError
from inc_clusterq.inputs import InputSpec
from inc_clusterq.models import FloatModel
from inc_clusterq.reconstruction.bits import LayerBits
from inc_clusterq.reconstruction.settings import ReconstructionSettings
from inc_clusterq.tuning import Trial, TuningRequest

Network = Callable[[str], tuple[nn.Module, Tensor]]
QUICK = {"iterations": 4, "batch_size": 8}
DYNAMIC = ({0: torch.export.Dim("batch", min=1, max=64)},)


@contextmanager
def scores_in_order(scores: list[float]) -> Iterator[tuple[Callable[[nn.Module], float], list[nn.Module]]]:
    """An `eval_fn` that hands out given scores, the float model's first, and the models it was given."""
    models: list[nn.Module] = []
    left = list(scores)

    def eval_fn(model: nn.Module) -> float:
        models.append(copy.deepcopy(model))
        return left.pop(0)

    yield eval_fn, models
    assert not left


@torch.no_grad()
@pytest.mark.parametrize("with_workspace", [False, True])
@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([1.0, 0.2, 0.6, 0.4], 2),  # none meets the goal, the best is not the last: it is quantized again
        ([1.0, 0.7, 0.6, 0.4], 1),
        ([1.0, 0.2, 0.3, 0.4], 3),
        ([1.0, 0.2, 0.995], 2),  # meets the goal: no third trial
    ],
)
def test_autotune_returns_the_best_model_it_has_scored(
    exported: nn.Module,
    inputs: Tensor,
    run_fn: Callable[[nn.Module], None],
    tmp_path: Path,
    with_workspace: bool,
    scores: list[float],
    best: int,
) -> None:
    workspace = str(tmp_path) if with_workspace else None
    config = MRECGConfig(w_bits=3, act_bits=[3, 4, 5], granularity="loss", workspace=workspace, **QUICK)  # type: ignore[arg-type]
    with scores_in_order(scores) as (eval_fn, models):
        tuned = autotune(exported, TuningConfig(config_set=[config], tolerable_loss=0.01), eval_fn=eval_fn, run_fn=run_fn)
    outputs = [model(inputs) for model in models]
    assert torch.equal(tuned(inputs), outputs[best])
    # The trials do differ; their sums would not show it, since corrected biases keep the mean.
    assert len({output.square().sum().item() for output in outputs}) == len(outputs)


def request(**keys: Any) -> TuningRequest:
    settings = ReconstructionSettings.model_validate(QUICK)
    return TuningRequest(**{"weight_bits": 3, "activation_bits": 3, "settings": settings, **keys})


def trials(*granularities: str) -> list[Trial]:
    return [Trial(name, ReconstructionSettings.model_validate({**QUICK, "granularity": name})) for name in granularities]


@torch.no_grad()
def test_the_adaptor_reports_every_trial_and_keeps_the_best(exported: nn.Module, inputs: Tensor, tmp_path: Path) -> None:
    with scores_in_order([0.9, 0.5, 0.8, 0.7]) as (score, models):
        outcome = NeuralCompressorAdaptor().tune(
            exported, inputs.split(8), trials("layer", "block", "loss"), request(), score, tmp_path
        )
    assert outcome.float_score == 0.9
    assert [(record.trial.label, record.score, record.met_goal) for record in outcome.trials] == [
        ("layer", 0.5, False), ("block", 0.8, False), ("loss", 0.7, False),
    ]  # fmt: skip
    assert outcome.best.trial.label == outcome.reconstruction.granularity == "block"
    assert torch.equal(outcome.model(inputs), models[2](inputs))


def test_the_adaptor_stops_at_the_first_trial_that_meets_the_goal(exported: nn.Module, inputs: Tensor) -> None:
    with scores_in_order([0.9, 0.88]) as (score, _):
        outcome = NeuralCompressorAdaptor().tune(
            exported, inputs.split(8), trials("block", "loss"), request(tolerable_loss=0.03), score, None
        )
    assert [record.met_goal for record in outcome.trials] == [True]


def test_trials_that_are_alike_are_refused_since_the_host_would_lose_count(exported: nn.Module, inputs: Tensor) -> None:
    for proposed, message in ((trials("block", "layer", "block"), "same trial twice: block"), ([], "no trial")):
        with pytest.raises(ClusterQError, match=message):
            NeuralCompressorAdaptor().tune(exported, inputs.split(10), proposed, request(), lambda model: 1.0, None)


def test_the_request_reaches_the_reconstruction(exported: nn.Module, inputs: Tensor) -> None:
    layers = {"two.conv1.0": LayerBits(8, None)}
    with scores_in_order([1.0, 1.0]) as (score, _):
        outcome = NeuralCompressorAdaptor().tune(
            exported, inputs.split(8), trials("layer"), request(weight_bits=2, layers=layers), score, None
        )
    capacities = {unit.name: unit.capacity for unit in outcome.reconstruction.units}
    assert capacities["one.conv1.0 .. one.conv2.0"] == 2 * 2 * 576
    assert capacities["two.conv1.0 .. two.conv2.0"] == pytest.approx(8 * 1.6 * 1152 + 2 * 2304)


LOADER = """
import sys, torch
from neural_compressor.torch.quantization import load
model = load(sys.argv[1])
inputs, expected = torch.load(sys.argv[2])
with torch.no_grad():
    assert torch.equal(model(inputs), expected), "outputs differ"
    torch.testing.assert_close(model(inputs[:1]), expected[:1])  # another batch size adds up in another order
assert not [name for name in sys.modules if name.startswith("inc_clusterq")], "the plugin was imported"
print("same")
"""


@torch.no_grad()
@pytest.mark.parametrize("name", ["residual", "shuffle", "signal", "worded"])
def test_a_saved_model_opens_with_the_host_alone_and_computes_the_same(network: Network, tmp_path: Path, name: str) -> None:
    module, inputs = network(name)
    exported = export(module, (inputs[:2],), dynamic_shapes=DYNAMIC)
    model = quantize(exported, MRECGConfig(w_bits=4, act_bits=4, **QUICK), run_fn=lambda model: model(inputs))  # type: ignore[arg-type]
    expected = model(inputs * 5)
    folder = tmp_path / "saved_results"
    NeuralCompressorAdaptor().save(model, inputs[:2], folder)
    assert {file.name for file in folder.iterdir()} == {"qconfig.json", "quantized_weight.pt"}
    for again, images in (("once", 2), ("twice", 1)):  # which the host's own function cannot
        model.save(example_inputs=(inputs[:images],), output_dir=str(tmp_path / again))
        assert torch.equal(NeuralCompressorAdaptor().load(tmp_path / again)(inputs * 5), expected)
        assert (tmp_path / again / "qconfig.json").read_text() == (folder / "qconfig.json").read_text()
    torch.save((inputs * 5, expected), tmp_path / "expected.pt")
    command = [sys.executable, "-c", LOADER, str(folder), str(tmp_path / "expected.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("same\n")
    assert torch.equal(NeuralCompressorAdaptor().load(folder)(inputs * 5), expected)


def test_a_saved_model_is_about_a_quarter_of_the_float_one(tmp_path: Path) -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 256, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4096, 8)
    ).eval()
    inputs = torch.randn(64, 3, 8, 8)
    weights = sum(parameter.numel() for parameter in module.parameters())
    model = quantize(
        export(module, (inputs[:2],), dynamic_shapes=DYNAMIC),
        MRECGConfig(iterations=0),
        run_fn=lambda model: model(inputs),
    )
    NeuralCompressorAdaptor().save(model, inputs[:2], tmp_path)
    size = (tmp_path / "quantized_weight.pt").stat().st_size
    assert weights < size < 1.5 * weights  # bytes; the graph itself takes some


def float_model(module: nn.Module, shape: tuple[int, ...] = (3, 8, 8)) -> FloatModel:
    return FloatModel("net", module.eval(), InputSpec(shape), 5, "0" * 64)


@torch.no_grad()
def test_an_exported_model_takes_any_number_of_images(network: Network) -> None:
    module, inputs = network("shuffle")
    exported = NeuralCompressorAdaptor().export(float_model(module))
    for count in (1, 2, 7):
        torch.testing.assert_close(exported(inputs[:count]), module(inputs[:count]))


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x) if x.sum() > 0 else self.layer(-x)
        return result


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(2, -1)


@pytest.mark.parametrize("module", [DataDependent(), FixedBatch()])
def test_a_model_that_cannot_be_exported_is_named_with_the_reason(module: nn.Module) -> None:
    with pytest.raises(ModelError, match=r"net cannot be exported: \w+: \w+"):
        NeuralCompressorAdaptor().export(float_model(module, (4,)))


@torch.no_grad()
def test_the_hosts_own_static_quantization_leaves_the_exported_model_as_it_is(exported: nn.Module, inputs: Tensor) -> None:
    before = exported(inputs)
    static = NeuralCompressorAdaptor().quantize_static(exported, inputs.split(8))
    assert torch.equal(exported(inputs), before)
    assert not torch.equal(static(inputs), before)
    torch.testing.assert_close(static(inputs), before, rtol=0.1, atol=float(before.abs().max()) * 0.1)


def test_versions_name_the_host_and_its_back_end() -> None:
    versions = NeuralCompressorAdaptor().versions()
    assert {"torch", "torchao"} < set(versions)
    assert any(name.startswith("neural-compressor") for name in versions)


def test_units_are_counted_and_names_are_checked_before_anything_is_calibrated(network: Network) -> None:
    module, _ = network("residual")
    adaptor, settings = NeuralCompressorAdaptor(), ReconstructionSettings()
    exported = adaptor.export(FloatModel("net", module, InputSpec((3, 8, 8), -2.0, 2.0), 5, ""))
    before = str(exported.graph)
    assert adaptor.count_units(exported, TuningRequest(4, 4, settings)) == 2  # of 4: first and last have 8 bits
    assert adaptor.count_units(exported, TuningRequest(8, 8, settings)) == 0
    assert adaptor.count_units(exported, TuningRequest(8, 8, settings, layers={"fc": LayerBits(4)})) == 1
    assert adaptor.count_units(exported, TuningRequest(7, 8, settings.model_copy(update={"weight_ceiling": 7}))) == 0
    assert adaptor.count_units(exported, TuningRequest(4, 4, settings.model_copy(update={"weight_ceiling": 4}))) == 2
    assert adaptor.count_units(exported, TuningRequest(4, 8, settings.model_copy(update={"weight_ceiling": 4}))) == 0
    with pytest.raises(ModelError, match=r"does not have: one\.conv1; did you mean one\.conv1\.0"):
        adaptor.count_units(exported, TuningRequest(4, 4, settings, layers={"one.conv1": LayerBits(8)}))
    explicit = ReconstructionSettings.model_validate({"granularity": "explicit", "explicit_units": [["one.conv1.0", "fcc"]]})
    with pytest.raises(ModelError, match="'fcc', which the model does not have; did you mean fc"):
        adaptor.count_units(exported, TuningRequest(4, 4, explicit))
    assert str(exported.graph) == before


def test_an_export_that_fails_without_a_word_is_told_by_its_kind() -> None:
    class Silent(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ArithmeticError

    with pytest.raises(ModelError, match=r"^net cannot be exported: ArithmeticError$"):
        NeuralCompressorAdaptor().export(FloatModel("net", Silent(), InputSpec((3, 8, 8)), 5, ""))


def test_an_export_that_fails_at_a_branch_is_told_with_its_place_and_without_the_graph(
    capfd: pytest.CaptureFixture[str],
) -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.abs().max() > 5:
                x = x.clamp(-5, 5)
            return x

    with pytest.raises(
        ModelError, match=r"data-dependent .* \(at \S+test_neural_compressor\.py:\d+: if x\.abs\(\)\.max\(\) > 5:\)$"
    ):
        NeuralCompressorAdaptor().export(FloatModel("net", Branching(), InputSpec((3, 8, 8)), 5, ""))
    assert "GraphModule" not in "".join(capfd.readouterr())
