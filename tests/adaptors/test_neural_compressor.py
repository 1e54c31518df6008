from __future__ import annotations

import copy
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from neural_compressor.torch.export import export
from neural_compressor.torch.quantization import TuningConfig, autotune, convert, prepare, quantize
from torch import Tensor, nn

from inc_clusterq.adaptors.neural_compressor import NeuralCompressorAdaptor
from inc_clusterq.adaptors.neural_compressor_algorithm import watched_by
from inc_clusterq.adaptors.neural_compressor_config import MRECGConfig
from inc_clusterq.errors import ClusterQError, ModelError
from inc_clusterq.inputs import InputSpec
from inc_clusterq.models import FloatModel
from inc_clusterq.origin import synthetic_images
from inc_clusterq.progress import Stage
from inc_clusterq.reconstruction.bits import LayerBits
from inc_clusterq.reconstruction.reconstruct import Reconstruction
from inc_clusterq.reconstruction.settings import ReconstructionSettings
from inc_clusterq.tuning import Trial, TuningRequest

Network = Callable[[str], tuple[nn.Module, Tensor]]
QUICK = {"iterations": 4, "batch_size": 8}
DYNAMIC = ({0: torch.export.Dim("batch", min=1, max=64)},)


@pytest.fixture(autouse=True)
def _silent_host() -> Iterator[None]:
    logger = logging.getLogger("neural_compressor")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(before)


@pytest.fixture
def exported(network: Network) -> nn.Module:
    """The host's export of a residual network."""
    module, inputs = network("residual")
    result: nn.Module = export(module, (inputs[:2],), dynamic_shapes=DYNAMIC)
    return result


@pytest.fixture
def inputs(network: Network) -> Tensor:
    return network("residual")[1]


@pytest.fixture
def run_fn(inputs: Tensor) -> Callable[[nn.Module], None]:
    """Calibration in batches, the last one short."""

    def run(model: nn.Module) -> None:
        for batch in inputs.split(10):
            model(batch)

    return run


@pytest.mark.parametrize(
    ("said", "bits", "mixtures"),
    [((True, True), 4, True), ((True, True), 8, False), ((True, False), 4, False), ((False, False), 4, False)],
)
def test_large_images_are_mixed_below_8_bits_where_all_of_them_are_said_to_be_synthetic(
    exported: nn.Module,
    inputs: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    said: tuple[bool, bool],
    bits: int,
    mixtures: bool,
) -> None:
    monkeypatch.setattr("inc_clusterq.inputs.LARGE", min(inputs.shape[2:]))  # pixels of the shorter side

    def run(model: nn.Module) -> None:
        for batch, synthetic in zip(inputs.chunk(2), said, strict=True):
            with synthetic_images() if synthetic else nullcontext():
                model(batch)

    found: Any = quantize(exported, MRECGConfig(w_bits=4, act_bits=bits, iterations=2), run_fn=run)
    assert found.reconstruction.mixtures is mixtures


@torch.no_grad()
@pytest.mark.parametrize("inplace", [True, False])
def test_prepare_and_convert_are_quantize_in_two_steps(
    exported: nn.Module, inputs: Tensor, run_fn: Callable[[nn.Module], None], inplace: bool
) -> None:
    config = MRECGConfig(w_bits=3, act_bits=4, **QUICK)  # type: ignore[arg-type]
    other = copy.deepcopy(exported)
    other._exported, other.dynamic_shapes = True, exported.dynamic_shapes  # type: ignore[assignment]
    prepared = prepare(other, config)
    run_fn(prepared)
    in_two_steps = convert(prepared, inplace=inplace)
    at_once = quantize(exported, config, run_fn=run_fn)
    assert torch.equal(in_two_steps(inputs), at_once(inputs))


@torch.no_grad()
def test_quantizing_leaves_the_users_float_model_alone(network: Network) -> None:
    module, inputs = network("transposed")  # has layers without BatchNorm, whose weights the exported graph shares
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    result = quantize(
        export(module, (inputs[:2],), dynamic_shapes=DYNAMIC),
        MRECGConfig(w_bits=2, **QUICK),  # type: ignore[arg-type]
        run_fn=lambda model: model(inputs),
    )
    assert not torch.equal(result(inputs), module(inputs))
    assert all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items())
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_run_args_reach_the_calibration(exported: nn.Module, inputs: Tensor) -> None:
    seen = []

    def run(model: nn.Module, images: Tensor) -> None:
        seen.append(len(images))
        model(images)

    quantize(exported, MRECGConfig(**QUICK), run_fn=run, run_args=(inputs,))  # type: ignore[arg-type]
    assert seen == [24]


def test_a_layers_own_bits_reach_the_graph(exported: nn.Module, run_fn: Callable[[nn.Module], None]) -> None:
    config = MRECGConfig(w_bits=8, layer_bits={"one.conv1.0": (2, None)}, **QUICK)  # type: ignore[arg-type]
    model = quantize(exported, config, run_fn=run_fn)
    levels = [int(tensor.unique().numel()) for tensor in model.buffers() if tensor.dtype is torch.int8]
    assert sum(count <= 4 for count in levels) == 1


def test_an_unknown_layer_is_an_error_that_lists_the_known_ones(
    exported: nn.Module, run_fn: Callable[[nn.Module], None]
) -> None:
    config = MRECGConfig(layer_bits={"conv9": (2, None)}, **QUICK)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"conv9; it has: stem\.0"):
        quantize(exported, config, run_fn=run_fn)


@torch.no_grad()
def test_units_that_fall_back_are_those_with_the_largest_relative_loss(
    exported: nn.Module, run_fn: Callable[[nn.Module], None]
) -> None:
    def make(units: int) -> Reconstruction:
        source = copy.deepcopy(exported)
        source._exported, source.dynamic_shapes = True, exported.dynamic_shapes  # type: ignore[assignment]
        config = MRECGConfig(w_bits=2, act_bits=2, granularity="block", fallback_units=units, **QUICK)  # type: ignore[arg-type]
        result: Reconstruction = quantize(source, config, run_fn=run_fn).reconstruction
        return result

    plain, raised = make(0), make(1)
    assert [unit.lowest_bits for unit in plain.units] == [8, 2, 2, 8]
    worst = max((1, 2), key=lambda i: plain.units[i].relative_loss)
    capacities = [b.capacity / a.capacity for a, b in zip(plain.units, raised.units, strict=True)]
    assert capacities[worst] == pytest.approx(4)  # 8 bits in place of 2
    assert all(ratio == 1 for i, ratio in enumerate(capacities) if i != worst)
    assert [unit.lowest_bits for unit in raised.units][worst] == 8


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


def test_reconstruction_reports_to_the_progress_that_watches(exported: nn.Module, run_fn: Callable[[nn.Module], None]) -> None:
    class Recorder:
        done = 0

        @contextmanager
        def stage(self, title: str, total: int) -> Iterator[Stage]:
            self.total = total
            yield self

        def advance(self, steps: int = 1, note: str = "") -> None:
            self.done += steps

    recorder = Recorder()
    with watched_by(recorder):
        quantize(exported, MRECGConfig(granularity="layer", **QUICK), run_fn=run_fn)  # type: ignore[arg-type]
    assert recorder.done == recorder.total == 4 * 4


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
@pytest.mark.parametrize("name", ["residual", "shuffle"])
def test_a_saved_model_opens_with_the_host_alone_and_computes_the_same(network: Network, tmp_path: Path, name: str) -> None:
    module, inputs = network(name)
    exported = export(module, (inputs[:2],), dynamic_shapes=DYNAMIC)
    model = quantize(exported, MRECGConfig(w_bits=4, act_bits=4, **QUICK), run_fn=lambda model: model(inputs))  # type: ignore[arg-type]
    expected = model(inputs * 5)
    folder = tmp_path / "saved_results"
    NeuralCompressorAdaptor().save(model, inputs[:2], folder)
    assert {file.name for file in folder.iterdir()} == {"qconfig.json", "quantized_weight.pt"}
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


def test_a_model_that_was_not_exported_is_refused(network: Network) -> None:
    module, inputs = network("chain")
    with pytest.raises(ModelError, match=r"call neural_compressor\.torch\.export\.export"):
        quantize(module, MRECGConfig(), run_fn=lambda model: model(inputs))


def test_a_model_that_was_not_prepared_is_refused(exported: nn.Module) -> None:
    with pytest.raises(ModelError, match="has not been prepared"):
        convert(exported, MRECGConfig())


def test_a_model_with_several_inputs_is_refused() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            result: Tensor = (self.a(x) + self.b(y)).mean((2, 3))
            return result

    pair = (torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8))
    with pytest.raises(ModelError, match="the model has 2 inputs"):
        quantize(export(Two(), pair), MRECGConfig(), run_fn=lambda model: model(*pair))


def test_a_model_without_weights_is_refused() -> None:
    inputs = torch.randn(4, 3, 8, 8)
    exported = export(nn.Sequential(nn.ReLU(), nn.Flatten()), (inputs,))
    with pytest.raises(ModelError, match="no convolution or linear operator"):
        quantize(exported, MRECGConfig(), run_fn=lambda model: model(inputs))


@pytest.mark.parametrize("run_fn", [None, lambda model: None])
def test_missing_calibration_images_are_an_error(exported: nn.Module, run_fn: Callable[[nn.Module], None] | None) -> None:
    with pytest.raises(ModelError, match="no calibration image has passed"):
        quantize(exported, MRECGConfig(), run_fn=run_fn)


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
