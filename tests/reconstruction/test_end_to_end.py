from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from inc_clusterq.progress import SILENT, Progress, Stage
from inc_clusterq.reconstruction import end_to_end
from inc_clusterq.reconstruction.checkpoint import UnitStore
from inc_clusterq.reconstruction.end_to_end import BATCH, end_to_end_loss, images_at_once, relative_error
from inc_clusterq.reconstruction.fake_quantize import ActivationQuantizer, Mode, WeightQuantizer
from inc_clusterq.reconstruction.learning import reconstruction_loss
from inc_clusterq.reconstruction.quantizers import QuantizedGraph, in_mode, initialise_activations, quantizers
from inc_clusterq.reconstruction.reconstruct import Reconstruction, reconstruct
from inc_clusterq.reconstruction.settings import FEWEST_IMAGES, ReconstructionSettings

Network = Callable[[str], tuple[nn.Module, Tensor]]
Quantized = Callable[..., QuantizedGraph]
Quick = Callable[..., ReconstructionSettings]
Found = tuple[Reconstruction, QuantizedGraph, Tensor]
Run = Callable[..., Found]


class Killed(BaseException):
    """Stands for the end of the process."""


class Told:
    """A progress that keeps what the pass end to end tells, and may die in the middle of it."""

    def __init__(self, *, dies: bool) -> None:
        self.dies, self.steps, self.found = dies, 0, 0
        self.pass_steps: int | None = None

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Stage]:
        self.pass_steps = total if "end to end" in title else None
        yield self

    def advance(self, steps: int = 1, note: str = "") -> None:
        if self.pass_steps is None:
            return
        self.steps += steps
        self.found += steps if note == "from disk" else 0
        if self.dies and self.steps > self.pass_steps // 2:
            raise Killed

    skip = advance


@pytest.fixture
def run(quantized: Quantized, network: Network) -> Run:
    """Reconstruct a network at 3 bits; the report, the graph and its outputs."""

    def make(name: str, settings: ReconstructionSettings, folder: Path | None = None, progress: Progress = SILENT) -> Found:
        _, inputs = network(name)
        graph = quantized(name, settings)
        report = reconstruct(graph, inputs, settings, seed=0, store=UnitStore(folder), progress=progress)
        with torch.no_grad():
            return report, graph, graph.graph_module(inputs)

    return make


def integers(graph: QuantizedGraph) -> list[Tensor]:
    return [part.integers for part in quantizers(graph.graph_module) if isinstance(part, WeightQuantizer)]


@pytest.mark.parametrize("name", ["chain", "residual", "depthwise", "squeeze_excite"])
def test_the_network_comes_closer_to_the_float_one_while_the_integers_stay(
    run: Run, network: Network, quick: Quick, name: str
) -> None:
    # Toys whose units are learned are all but exact, which leaves nothing to gain. With the usual rate what chance adds at
    # every step is as much as there is to gain.
    keys = {"iterations": 0, "start": "nearest", "end_to_end_learning_rate": 2e-3}
    _, inputs = network(name)
    report, after, found = run(name, quick(end_to_end_iterations=100, **keys))
    with torch.no_grad(), in_mode(after.graph_module, Mode.FLOAT):
        targets = after.graph_module(inputs)
    _, unchanged, outputs = run(name, quick(end_to_end_iterations=0, **keys))
    last = report.end_to_end
    assert last is not None
    power = targets.square().sum()
    assert last.relative_loss_before == pytest.approx(float((outputs - targets).square().sum() / power), rel=1e-4)
    assert last.relative_loss == pytest.approx(float((found - targets).square().sum() / power), rel=1e-4)
    assert last.relative_loss < last.relative_loss_before
    assert all(torch.equal(one, other) for one, other in zip(integers(after), integers(unchanged), strict=True))


def test_without_learned_weight_steps_the_weights_stay(run: Run, quick: Quick) -> None:
    keys = {"iterations": 0, "start": "nearest", "learn_weight_scale": False}
    _, before, _ = run("chain", quick(end_to_end_iterations=0, **keys))
    report, after, _ = run("chain", quick(end_to_end_iterations=100, **keys))
    assert report.end_to_end is not None
    assert report.end_to_end.relative_loss < report.end_to_end.relative_loss_before
    scales = [
        [part.start_scale for part in quantizers(graph.graph_module) if isinstance(part, WeightQuantizer)]
        for graph in (before, after)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*scales, strict=True))


def test_where_it_leads_nowhere_all_is_left_as_the_units_left_it(
    run: Run, quick: Quick, caplog: pytest.LogCaptureFixture
) -> None:
    _, _, expected = run("depthwise", quick(end_to_end_iterations=0))
    report, _, outputs = run("depthwise", quick(end_to_end_iterations=3, end_to_end_learning_rate=1.0))
    assert torch.equal(outputs, expected)
    assert report.end_to_end is not None
    assert report.end_to_end.relative_loss == pytest.approx(report.end_to_end.relative_loss_before, rel=1e-5)
    assert "stays" in caplog.text


def test_where_gradients_are_no_numbers_all_is_left_as_the_units_left_it(
    run: Run, quick: Quick, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, expected = run("depthwise", quick(end_to_end_iterations=0))
    monkeypatch.setattr(
        "inc_clusterq.reconstruction.end_to_end.reconstruction_loss", lambda *given: reconstruction_loss(*given).sub(1).sqrt()
    )
    report, _, outputs = run("depthwise", quick(end_to_end_iterations=3))
    assert torch.equal(outputs, expected)
    assert report.end_to_end is not None
    assert report.end_to_end.relative_loss == pytest.approx(report.end_to_end.relative_loss_before, rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "given", "steps"),
    [(0.2, None, 21), (0.05, None, 0), (0.2, 3, 3), (0.05, 3, 3), (0.2, 0, 0), (float("nan"), None, 0)],
)
def test_by_default_it_is_for_networks_that_are_far_off(quick: Quick, loss: float, given: int | None, steps: int) -> None:
    assert quick(iterations=7, end_to_end_iterations=given).end_to_end_steps(loss) == steps


def test_a_network_that_is_far_off_by_default_takes_three_times_the_steps_of_a_unit(
    run: Run, quick: Quick, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("chain", quick())[0].end_to_end is None  # the toy is all but exact
    monkeypatch.setattr("inc_clusterq.reconstruction.settings.FAR_OFF", 0.0)
    last = run("chain", quick())[0].end_to_end
    assert last is not None
    assert last.steps == 3 * quick().iterations


class Listener(fx.Interpreter):
    """Runs a graph node by node, and keeps what comes to the activation quantizers, but for those of the network's input."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.heard: list[Tensor] = []

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(self.fetch_attr(target), ActivationQuantizer):
            self.heard.append(args[0])
        return super().call_module(target, args, kwargs)


@pytest.mark.parametrize("name", ["chain", "residual", "depthwise", "concat", "tied"])
def test_its_loss_is_that_of_the_outputs_and_the_mean_relative_one_of_what_comes_to_the_quantizers(
    network: Network, quantized: Quantized, name: str
) -> None:
    _, inputs = network(name)
    graph = quantized(name)
    initialise_activations(graph, inputs, 64)
    module = graph.graph_module
    with in_mode(module, Mode.STEPS):
        found = [end_to_end_loss(module, inputs, features) for features in (0.0, 20.0)]
        with torch.no_grad():
            outputs = (heard := Listener(module)).run(inputs)
    with in_mode(module, Mode.FLOAT), torch.no_grad():
        y = (exact := Listener(module)).run(inputs)
    errors = [
        float(((one - other) ** 2).sum() / (other**2).sum())
        for one, other in zip(heard.heard, exact.heard, strict=True)
        if one is not inputs
    ]
    assert min(errors) >= 0
    assert max(errors) > 0
    of_outputs, power = ((outputs - y) ** 2).sum(1).mean(), (y**2).sum(1).mean()
    assert found[0].item() == pytest.approx(float(of_outputs), rel=1e-5)
    assert found[1].item() == pytest.approx(float(of_outputs + 20 * power * sum(errors) / len(errors)), rel=1e-4)


def test_what_comes_to_the_quantizers_is_nearer_to_the_float_network_where_it_counts(
    run: Run, network: Network, quick: Quick
) -> None:
    keys = {"iterations": 0, "start": "nearest", "end_to_end_iterations": 200}
    _, inputs = network("residual")

    def hidden_error(features: float) -> float:
        _, graph, _ = run("residual", quick(end_to_end_features=features, **keys))
        (found := Listener(graph.graph_module)).run(inputs)
        with in_mode(graph.graph_module, Mode.FLOAT):
            (exact := Listener(graph.graph_module)).run(inputs)
        return sum(
            float(((one - other) ** 2).sum() / (other**2).sum()) for one, other in zip(found.heard, exact.heard, strict=True)
        )

    with torch.no_grad():
        assert hidden_error(20.0) < hidden_error(0.0)


@pytest.mark.parametrize(
    ("found", "exact", "error"),
    [([3.0, 1.0], [1.0, 2.0], 1.0), ([0.0, 0.0], [1.0, 2.0], 1.0), ([5.0, 0.0], [1e-9, 0.0], 4.0)],
)
def test_a_relative_error_is_bounded_where_the_float_network_is_dead(
    found: list[float], exact: list[float], error: float
) -> None:
    learned = torch.tensor(found, requires_grad=True)
    with torch.enable_grad():
        told = relative_error(learned, torch.tensor(exact))
        told.backward()
    assert told.item() == pytest.approx(error)
    assert learned.grad is not None
    assert bool(learned.grad.isfinite().all())
    assert float(relative_error(torch.zeros(2), torch.zeros(2))) == 0


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("name", ["residual", "concat", "tied", "transposed"])
def test_killed_on_the_way_it_goes_on_there_and_ends_bit_identical(
    run: Run, quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, saved: bool
) -> None:
    monkeypatch.setattr(end_to_end, "SAVE_SECONDS", 0 if saved else 1e9)
    settings = quick(granularity="layer", end_to_end_iterations=40)
    whole, _, outputs = run(name, settings)
    with pytest.raises(Killed):
        run(name, settings, tmp_path, Told(dies=True))
    for resumed in (False, True):
        told = Told(dies=False)
        report, _, found = run(name, settings, tmp_path, told)
        assert (told.steps, told.found) == (40, 40 if resumed else 21 if saved else 0)
        assert not list(tmp_path.glob("*unfinished*"))
        assert all(unit.resumed for unit in report.units)
        assert report.end_to_end is not None
        assert whole.end_to_end is not None
        assert report.end_to_end.resumed == resumed
        assert report.end_to_end.relative_loss == whole.end_to_end.relative_loss
        assert torch.equal(found, outputs)


def test_a_damaged_state_of_it_is_named_and_it_begins_anew(
    run: Run, quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(end_to_end, "SAVE_SECONDS", 0)
    settings = quick(end_to_end_iterations=40)
    with pytest.raises(Killed):
        run("chain", settings, tmp_path, Told(dies=True))
    (file,) = tmp_path.glob("*unfinished*")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    told = Told(dies=False)
    _, _, outputs = run("chain", settings, tmp_path, told)
    assert told.found == 0
    assert f"{file} cannot be used (its checksum is wrong); the unit is begun anew" in caplog.text
    assert torch.equal(outputs, run("chain", settings)[2])


def test_other_steps_of_it_need_no_unit_anew(run: Run, quick: Quick, tmp_path: Path) -> None:
    run("chain", quick(end_to_end_iterations=4), tmp_path)
    report, _, outputs = run("chain", quick(end_to_end_iterations=9), tmp_path)
    assert all(unit.resumed for unit in report.units)
    assert report.end_to_end is not None
    assert not report.end_to_end.resumed
    assert torch.equal(outputs, run("chain", quick(end_to_end_iterations=9))[2])


def test_as_many_images_go_through_together_as_memory_allows(
    network: Network, quantized: Quantized, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, inputs = network("chain")
    graph = quantized("chain")
    initialise_activations(graph, inputs, 64)
    (heard := Listener(graph.graph_module)).run(inputs[:1])
    of_one = sum(maps.numel() for maps in heard.heard)
    found = []
    for values, most in ((2**25, 32), (11.5 * of_one, 32), (of_one, 32), (2**25, 5)):
        monkeypatch.setattr(end_to_end, "VALUES_AT_ONCE", int(values))
        found.append(images_at_once(graph.graph_module, inputs, ReconstructionSettings(batch_size=most)))
    assert found == [BATCH, 8, FEWEST_IMAGES, 4]  # 11 would leave 5, and 5 would leave 1


def test_no_gradient_of_a_weight_is_taken(run: Run, quick: Quick) -> None:
    with torch.profiler.profile(record_shapes=True) as profile:
        run("depthwise", quick(iterations=0, end_to_end_iterations=2))
    masks = [list(event.concrete_inputs[-1]) for event in profile.events() if event.name == "aten::convolution_backward"]
    assert masks
    assert all(mask == [True, False, False] for mask in masks)
