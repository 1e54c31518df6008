from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from odd_networks import Twin
from torch import Tensor, fx, nn

from inc_clusterq.progress import Stage
from inc_clusterq.reconstruction.bits import BitPlan
from inc_clusterq.reconstruction.checkpoint import UnitStore
from inc_clusterq.reconstruction.fake_quantize import ActivationQuantizer, Mode, WeightQuantizer
from inc_clusterq.reconstruction.quantizers import QuantizedGraph, in_mode, install_quantizers, quantizers
from inc_clusterq.reconstruction.reconstruct import Reconstruction, reconstruct
from inc_clusterq.reconstruction.settings import ReconstructionSettings

Network = Callable[[str], tuple[nn.Module, Tensor]]
Prepare = Callable[[nn.Module, Tensor], fx.GraphModule]
Quantized = Callable[..., QuantizedGraph]
Quick = Callable[..., ReconstructionSettings]
Run = Callable[..., tuple[Reconstruction, QuantizedGraph, Tensor]]


@pytest.fixture
def run(quantized: Quantized, network: Network) -> Run:
    """Reconstruct a network at 3 bits; the report, the graph and its outputs."""

    def make(
        name: str, settings: ReconstructionSettings, seed: int = 0, folder: Path | None = None, images: int = 24
    ) -> tuple[Reconstruction, QuantizedGraph, Tensor]:
        _, inputs = network(name)
        graph = quantized(name, settings)
        report = reconstruct(graph, inputs[:images], settings, seed=seed, store=UnitStore(folder))
        with torch.no_grad():
            return report, graph, graph.graph_module(inputs)

    return make


@torch.no_grad()
def output_error(graph: QuantizedGraph, inputs: Tensor) -> float:
    with in_mode(graph.graph_module, Mode.FLOAT):
        expected = graph.graph_module(inputs)
    return float((graph.graph_module(inputs) - expected).square().mean())


@pytest.mark.parametrize("name", ["chain", "residual", "depthwise", "squeeze_excite", "concat"])
def test_optimisation_lowers_the_loss_of_rounding_to_nearest(run: Run, network: Network, quick: Quick, name: str) -> None:
    _, inputs = network(name)
    nearest, plain, _ = run(name, quick(iterations=0, start="nearest", correct_bias=False))
    learned, graph, _ = run(name, quick(iterations=150, warm_up=0.1))
    assert sum(unit.relative_loss for unit in learned.units) < sum(unit.relative_loss for unit in nearest.units)
    assert output_error(graph, inputs) < output_error(plain, inputs)


def test_on_a_gpu_it_would_be_computed_in_float32_and_the_same_each_time(
    quantized: Quantized, network: Network, quick: Quick
) -> None:
    graph, settings = quantized("chain"), quick(iterations=2)
    seen: set[tuple[bool, bool, bool]] = set()

    def look(*_: object) -> None:
        flags = torch.backends.cudnn
        seen.add((flags.deterministic, flags.benchmark, flags.allow_tf32))

    for layer in graph.graph_module.modules():
        layer.register_forward_pre_hook(look)
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=True):
        reconstruct(graph, network("chain")[1], settings, seed=0, store=UnitStore())
    assert seen == {(True, False, False)}


def test_without_iterations_weights_are_rounded_to_nearest(run: Run, quick: Quick) -> None:
    _, graph, _ = run("chain", quick(iterations=0, start="nearest"))
    weights = dict(graph.graph_module.named_parameters())
    for unit in graph.units:
        for layer in unit.layers:
            assert layer.quantizer is not None
            quantizer = getattr(graph.graph_module, layer.quantizer)
            lowest, highest = -(2 ** (quantizer.bits - 1)), 2 ** (quantizer.bits - 1) - 1
            expected = (weights[layer.weight] / quantizer.start_scale).round().clamp(lowest, highest)
            assert torch.equal(quantizer.integers, expected)


@pytest.mark.parametrize(("start", "longest"), [("nearest", 5000), ("second_order", 5000), ("nearest", 0)])
def test_biases_keep_the_mean_of_the_output(
    run: Run, network: Network, quick: Quick, monkeypatch: pytest.MonkeyPatch, start: str, longest: int
) -> None:
    monkeypatch.setattr("inc_clusterq.reconstruction.starting.MOST_WEIGHTS", longest)  # per row, with second moments
    module, inputs = network("chain")
    with torch.no_grad():
        expected = module(inputs).mean(0)
    _, _, corrected = run("chain", quick(iterations=0, start=start))
    _, _, plain = run("chain", quick(iterations=0, start=start, correct_bias=False))
    torch.testing.assert_close(corrected.mean(0), expected, rtol=1e-3, atol=1e-4)
    assert (plain.mean(0) - expected).abs().max() > 2e-3


@pytest.mark.parametrize("name", ["chain", "depthwise", "squeeze_excite"])
def test_the_second_order_start_is_better_than_rounding_to_nearest(run: Run, network: Network, quick: Quick, name: str) -> None:
    _, inputs = network(name)
    _, nearest, _ = run(name, quick(iterations=0, start="nearest"))
    _, found, _ = run(name, quick(iterations=0))
    assert output_error(found, inputs) < output_error(nearest, inputs)


def test_a_unit_that_learning_has_made_worse_goes_back_to_its_start(run: Run, quick: Quick) -> None:
    wild = {"iterations": 3, "weight_learning_rate": 1.0, "activation_learning_rate": 1.0, "bias_learning_rate": 1.0}
    start, _, outputs = run("depthwise", quick(iterations=0, granularity="layer"))
    learned, _, found = run("depthwise", quick(granularity="layer", **wild))
    assert [unit.loss for unit in learned.units] == [unit.loss for unit in start.units]
    assert torch.equal(found, outputs)


@pytest.mark.parametrize("granularity", ["layer", "block", "modcap", "loss"])
def test_the_same_seed_gives_the_same_model_to_the_bit(run: Run, quick: Quick, granularity: str) -> None:
    settings = quick(granularity=granularity, iterations=12)
    torch.manual_seed(1)
    _, _, first = run("residual", settings)
    torch.manual_seed(2)
    _, _, second = run("residual", settings)
    _, _, other = run("residual", settings, seed=1)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", ["residual", "shuffle"])
def test_mapped_inputs_and_targets_give_the_same_model_to_the_bit(run: Run, quick: Quick, tmp_path: Path, name: str) -> None:
    report, _, outputs = run(name, quick(memory_budget=0), folder=tmp_path)
    other, _, expected = run(name, quick())
    assert torch.equal(outputs, expected)
    assert [unit.loss for unit in report.units] == [unit.loss for unit in other.units]
    assert {file.suffix for file in tmp_path.iterdir()} == {".safetensors"}


def test_the_global_random_state_is_left_alone(run: Run, quick: Quick) -> None:
    before = torch.get_rng_state()
    run("chain", quick())
    assert torch.equal(torch.get_rng_state(), before)


def test_every_quantizer_ends_in_the_mode_that_is_deployed(run: Run, quick: Quick) -> None:
    for granularity in ("block", "loss"):
        _, graph, _ = run("residual", quick(granularity=granularity))
        found = list(quantizers(graph.graph_module))
        assert {quantizer.mode for quantizer in found} == {Mode.HARD}
        assert all(quantizer.drop_probability == 0 for quantizer in found if isinstance(quantizer, ActivationQuantizer))
        integers = [quantizer.integers for quantizer in found if isinstance(quantizer, WeightQuantizer)]
        assert all(torch.equal(tensor, tensor.round()) for tensor in integers)


def test_units_are_those_of_the_granularity(run: Run, quick: Quick) -> None:
    def layers(**keys: object) -> list[str]:
        return [" ".join(unit.layers) for unit in run("depthwise", quick(iterations=1, **keys))[0].units]

    assert layers(granularity="layer") == ["stem.0", "dw1.0", "pw1.0", "dw2.0", "pw2.0", "fc"]
    assert layers(granularity="block") == ["stem.0 dw1.0 pw1.0", "dw2.0 pw2.0 fc"]
    assert layers(granularity="block", stack_layers=2) == ["stem.0 dw1.0", "pw1.0 dw2.0", "pw2.0 fc"]
    # No two neighbours are of one kind, so nothing can be joined.
    assert layers(granularity="modcap", top_k=1, stack_layers=1) == ["stem.0", "dw1.0", "pw1.0", "dw2.0", "pw2.0", "fc"]


def test_explicit_units_are_reconstructed_as_listed(run: Run, quick: Quick) -> None:
    settings = quick(iterations=1, granularity="explicit", explicit_units=[["dw1.0", "pw1.0"]])
    report, _, _ = run("depthwise", settings)
    assert [" ".join(unit.layers) for unit in report.units] == ["stem.0", "dw1.0 pw1.0", "dw2.0", "pw2.0", "fc"]


@pytest.mark.parametrize("keys", [{"granularity": "explicit"}, {"explicit_units": [["fc"]]}])
def test_explicit_units_and_their_granularity_need_each_other(quick: Quick, keys: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="explicit_units"):
        quick(**keys)


def test_modcap_joins_the_homogeneous_neighbours_that_differ_most(run: Run, quick: Quick) -> None:
    report, _, _ = run("residual", quick(iterations=1, granularity="modcap", top_k=1))
    assert [" ".join(unit.layers) for unit in report.units] == [
        "stem.0",
        "one.conv1.0 one.conv2.0 two.conv1.0 two.conv2.0",
        "fc",
    ]
    # 3 bits: 576 * 2 weights, then 1152 of stride 2 and 2304.
    assert report.units[1].capacity == pytest.approx(3 * (1152 + 1.6 * 1152 + 2304))


def test_the_loss_metric_joins_the_neighbours_whose_base_losses_differ_most(run: Run, quick: Quick) -> None:
    report, _, _ = run("chain", quick(iterations=3, granularity="loss", top_k=1, stack_layers=1))
    losses = [unit.loss for unit in report.base]
    gaps = [(a - b) ** 2 for a, b in pairwise(losses)]
    i = gaps.index(max(gaps))
    names = [unit.layers for unit in report.base]
    assert [unit.layers for unit in report.units] == [*names[:i], names[i] + names[i + 1], *names[i + 2 :]]


def test_the_loss_metric_takes_over_the_units_before_the_first_merge(run: Run, quick: Quick, tmp_path: Path) -> None:
    settings = quick(granularity="loss", top_k=1, stack_layers=1)
    report, _, outputs = run("chain", settings, folder=tmp_path)
    merged = next(i for i, unit in enumerate(report.units) if len(unit.layers) > 1)
    assert [unit.resumed for unit in report.units] == [i < merged for i in range(len(report.units))]
    assert not any(unit.resumed for unit in report.base)
    assert [unit.loss for unit in report.units[:merged]] == [unit.loss for unit in report.base[:merged]]
    assert torch.equal(outputs, run("chain", settings)[2])  # as without a folder


@pytest.mark.parametrize("granularity", ["layer", "loss"])
def test_the_fisher_weighted_loss_gives_another_model_and_the_same_one_again(run: Run, quick: Quick, granularity: str) -> None:
    keys = {"granularity": granularity, "iterations": 40, "start": "nearest"}
    _, _, first = run("residual", quick(loss="fisher", **keys))
    _, _, second = run("residual", quick(loss="fisher", **keys))
    _, _, squared = run("residual", quick(**keys))
    assert torch.equal(first, second)
    assert not torch.equal(first, squared)


def test_a_merge_of_nothing_is_the_base_pass(run: Run, quick: Quick) -> None:
    report, _, outputs = run("chain", quick(granularity="loss", top_k=0))
    assert report.units == report.base
    assert torch.equal(outputs, run("chain", quick(granularity="block"))[2])


@pytest.mark.parametrize("images", [1, 3, 8])
def test_fewer_images_than_a_batch_are_enough(run: Run, quick: Quick, images: int) -> None:
    report, _, outputs = run("chain", quick(batch_size=32), images=images)
    assert torch.isfinite(outputs).all()
    assert len(report.units) == 2


def test_no_images_are_an_error(quantized: Quantized, quick: Quick) -> None:
    with pytest.raises(ValueError, match="needs calibration images"):
        reconstruct(quantized("chain"), torch.empty(0, 3, 8, 8), quick(), seed=0, store=UnitStore())


def test_reported_losses_are_those_of_the_finished_graph(run: Run, network: Network, quick: Quick) -> None:
    _, inputs = network("chain")
    report, graph, outputs = run("chain", quick(end_to_end_iterations=0))
    with torch.no_grad(), in_mode(graph.graph_module, Mode.FLOAT):
        targets = graph.graph_module(inputs)
    assert report.units[-1].loss == pytest.approx(float((outputs - targets).square().sum(1).mean()), rel=1e-5)
    power = float(targets.square().sum(1).mean())
    assert report.units[-1].relative_loss == pytest.approx(report.units[-1].loss / power, rel=1e-5)


@pytest.mark.parametrize("name", ["concat", "tied"])
def test_a_quantizer_that_two_units_share_stays_as_its_first_unit_left_it(
    run: Run, quantized: Quantized, network: Network, quick: Quick, name: str
) -> None:
    settings = quick(granularity="layer", iterations=30, end_to_end_iterations=0)
    _, inputs = network(name)
    report, graph, outputs = run(name, settings)
    with torch.no_grad(), in_mode(graph.graph_module, Mode.FLOAT):
        targets = graph.graph_module(inputs)
    # The losses are measured on the way, so they agree with the end only if nothing changed behind them. They are of the order
    # of float32's own rounding here, which differs from machine to machine.
    assert report.units[-1].loss == pytest.approx(float((outputs - targets).square().sum(1).mean()), rel=1e-3)


@pytest.mark.parametrize("granularity", ["layer", "modcap"])
def test_a_bias_of_its_own_is_corrected_behind_a_weight_that_another_layer_has_too(
    prepare: Prepare, quick: Quick, granularity: str
) -> None:
    torch.manual_seed(0)
    inputs, settings = torch.rand(16, 3, 8, 8), quick(granularity=granularity)
    graph = install_quantizers(prepare(Twin().eval(), inputs), BitPlan(3, 3), settings)
    reconstruct(graph, inputs, settings, seed=0, store=UnitStore())
    corrections = [graph.correction(layer) for unit in graph.units for layer in unit.layers]
    assert len(corrections) == 5
    assert all(correction is not None and bool((correction.unit > 0).all()) for correction in corrections)


@pytest.mark.parametrize("name", ["transposed", "in_place", "shuffle"])
def test_units_of_every_kind_can_be_optimised(run: Run, quick: Quick, name: str) -> None:
    report, _, outputs = run(name, quick(granularity="layer"))
    assert torch.isfinite(outputs).all()
    assert all(unit.loss >= 0 for unit in report.units)


@pytest.mark.parametrize(
    "keys",
    [
        {"learn_weight_scale": True},
        {"drop_probability": 0.0},
        {"drop_probability": 0.2},
        {"drop_probability": 1.0},
        {"warm_up": 0.0},
        {"activation_learning_rate": 0.0},
        {"rounding_weight": 0.0},
        {"bias_learning_rate": 0.0},
        {"correct_bias": False},
        {"start": "nearest"},
        {"loss": "fisher"},
        {"iterations": 1},
        {"batch_size": 1},
    ],
)
def test_settings_at_their_limits_give_a_finite_model(run: Run, quick: Quick, keys: dict[str, object]) -> None:
    report, _, outputs = run("chain", quick(**keys))
    assert torch.isfinite(outputs).all()
    assert all(0 <= unit.relative_loss < 1 for unit in report.units)


def test_the_float_weights_are_untouched(network: Network, quantized: Quantized, run: Run, quick: Quick) -> None:
    before = {key: tensor.clone() for key, tensor in quantized("residual").graph_module.named_parameters()}
    _, graph, _ = run("residual", quick())
    weights = {layer.weight for unit in graph.units for layer in unit.layers}
    after = dict(graph.graph_module.named_parameters())
    assert all(torch.equal(after[key], before[key]) for key in weights)


class Recorder:
    """A progress that keeps what it is told."""

    def __init__(self) -> None:
        self.totals: list[int] = []
        self.steps: list[int] = []

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Stage]:
        self.totals.append(total)
        self.steps.append(0)
        yield self

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.steps[-1] += steps

    skip = advance


@pytest.mark.parametrize("iterations", [0, 1, 19, 45])
@pytest.mark.parametrize("name", ["chain", "transposed"])
def test_progress_reaches_its_total_exactly(
    quantized: Quantized, network: Network, quick: Quick, tmp_path: Path, iterations: int, name: str
) -> None:
    _, inputs = network(name)
    recorder = Recorder()
    settings = quick(iterations=iterations, granularity="layer")
    for _ in range(2):  # the second time from disk
        reconstruct(quantized(name), inputs, settings, seed=0, store=UnitStore(tmp_path), progress=recorder)
    assert recorder.steps == recorder.totals == [len(quantized(name).units) * iterations] * 2
