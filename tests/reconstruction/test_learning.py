from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from odd_networks import Inception
from torch import Tensor, fx, nn

from inc_clusterq.progress import Stage
from inc_clusterq.reconstruction.bits import BitPlan
from inc_clusterq.reconstruction.fake_quantize import Mode, WeightQuantizer
from inc_clusterq.reconstruction.graph import extract
from inc_clusterq.reconstruction.learning import Flow, images_per_step, keep_back, learning, optimise, reconstruction_loss
from inc_clusterq.reconstruction.quantizers import (
    QuantizedGraph,
    in_mode,
    initialise_activations,
    install_quantizers,
    simulated,
)
from inc_clusterq.reconstruction.settings import ReconstructionSettings

Network = Callable[[str], tuple[nn.Module, Tensor]]
Prepare = Callable[[nn.Module, Tensor], fx.GraphModule]
Quantized = Callable[..., QuantizedGraph]
Quick = Callable[..., ReconstructionSettings]
Learn = Callable[..., tuple[fx.GraphModule, Flow]]

LOUD = {"iterations": 40, "weight_learning_rate": 1.0, "rounding_weight": 10.0, "warm_up": 0.0, "beta_start": 2.1}
"""Rounding that is decided after a few steps."""


class Nobody(Stage):
    def advance(self, steps: int = 1, note: str = "") -> None: ...

    skip = advance


@pytest.fixture
def learn(quantized: Quantized, network: Network) -> Learn:
    """The second unit of a chain after its optimisation, from the images of the given numbers and no others."""

    def make(
        settings: ReconstructionSettings,
        learned_from: Tensor,
        judged_by: Tensor,
        spoilt: int | None = None,
        spoilt_float: int | None = None,
    ) -> tuple[fx.GraphModule, Flow]:
        _, inputs = network("chain")
        graph = quantized("chain", settings)
        initialise_activations(graph, inputs, 8)
        unit = extract(graph.graph_module, graph.units[1])
        first = extract(graph.graph_module, graph.units[0])
        with torch.no_grad(), in_mode(graph.graph_module, Mode.FLOAT):
            x = first(inputs)
            flow = Flow(x.clone(), x.clone(), unit(x), None, learned_from, judged_by)
        if spoilt is not None:
            flow.float_inputs[spoilt] = flow.quantized_inputs[spoilt] = flow.targets[spoilt] = torch.nan
        if spoilt_float is not None:
            flow.float_inputs[spoilt_float] = torch.nan
        optimise(unit, flow, settings, torch.Generator().manual_seed(0), Nobody(), "unit", set())
        return unit, flow

    return make


def test_gradients_pass_through_what_an_earlier_unit_has_settled(prepare: Prepare) -> None:
    torch.manual_seed(0)
    x = torch.rand(8, 3, 8, 8)
    graph = install_quantizers(prepare(Inception().eval(), x), BitPlan(4, 4), ReconstructionSettings())
    initialise_activations(graph, x, 8)
    settled: set[nn.Module] = set()
    inside = []
    for unit in graph.units:
        module = extract(graph.graph_module, unit)
        learned = nn.ModuleList(part for part in simulated(module) if part not in settled)
        with torch.no_grad(), in_mode(module, Mode.FLOAT):
            y = module(x)
        with learning(module, learned, 0.0, torch.Generator()):
            reconstruction_loss(module(x), y).backward()
        gradients = [part.v.grad for part in learned if isinstance(part, WeightQuantizer)]
        assert all(gradient is not None and bool(gradient.any()) for gradient in gradients), unit.name
        inside += [unit.name for part in simulated(module) if part in settled]
        settled.update(simulated(module))
        x = y
    assert "middle .. reduced" in inside


@pytest.mark.parametrize(
    ("shape", "images"),
    [
        ((64, 8, 8), 32),  # 64 positions each: 64 images would have 4,096, but 32 are the most
        ((32, 16, 16), 16),
        ((16, 32, 32), 4),
        ((16, 112, 112), 4),  # 12,544 positions: the fewest images
        ((16, 8, 8, 8), 8),
        ((1000,), 32),
    ],
)
def test_a_step_takes_as_many_images_as_have_enough_positions(shape: tuple[int, ...], images: int) -> None:
    settings = ReconstructionSettings(batch_size=32, step_positions=4096)
    assert images_per_step(torch.empty(shape), settings) == images
    assert images_per_step(torch.empty(shape), ReconstructionSettings(batch_size=2)) == 2


def test_the_loss_is_summed_over_channels_and_averaged_over_the_rest() -> None:
    outputs, targets = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 5)
    outputs[0, :, 0, 0] = torch.tensor([1.0, 2.0, 3.0])
    assert float(reconstruction_loss(outputs, targets)) == pytest.approx(14 / (2 * 4 * 5))
    assert float(reconstruction_loss(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2))) == 25


@pytest.mark.parametrize(("count", "share", "kept"), [(256, 0.125, 32), (24, 0.125, 3), (9, 0.125, 1), (100, 0.5, 50)])
def test_images_are_learned_from_or_judged_by_and_never_both(count: int, share: float, kept: int) -> None:
    learned_from, judged_by = keep_back(count, share, 3, torch.device("cpu"))
    assert len(judged_by) == kept
    assert sorted([*learned_from.tolist(), *judged_by.tolist()]) == list(range(count))


@pytest.mark.parametrize(("count", "share"), [(256, 0.0), (7, 0.125), (1, 0.9)])
def test_all_images_do_both_where_the_share_is_less_than_one(count: int, share: float) -> None:
    learned_from, judged_by = keep_back(count, share, 3, torch.device("cpu"))
    assert learned_from is judged_by
    assert sorted(learned_from.tolist()) == list(range(count))


def test_the_images_kept_back_come_from_the_seed(quick: Quick) -> None:
    first, same, other = (keep_back(64, 0.25, seed, torch.device("cpu"))[1] for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_an_image_that_is_in_neither_part_counts_for_nothing(learn: Learn, quick: Quick) -> None:
    learned_from, judged_by = torch.arange(2, 20), torch.arange(20, 24)
    expected, _ = learn(quick(iterations=20), learned_from, judged_by)
    found, _ = learn(quick(iterations=20), learned_from, judged_by, spoilt=0)
    for one, other in zip(expected.state_dict().values(), found.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_nothing_is_learned_from_the_images_that_judge(learn: Learn, quick: Quick) -> None:
    # Judging takes the quantized inputs alone, so what the float ones hold would only be seen by learning.
    parts = torch.arange(2, 20), torch.arange(20, 24)
    expected, _ = learn(quick(iterations=20), *parts)
    found, _ = learn(quick(iterations=20), *parts, spoilt_float=21)
    for one, other in zip(expected.state_dict().values(), found.state_dict().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("rate", [1e-3, 1e-1, 1.0])
def test_a_unit_is_never_worse_than_its_start_on_the_images_that_judge(learn: Learn, quick: Quick, rate: float) -> None:
    parts = torch.arange(4, 24), torch.arange(4)
    wild = {"weight_learning_rate": rate, "activation_learning_rate": rate, "bias_learning_rate": rate}

    @torch.no_grad()
    def judged(unit: nn.Module, flow: Flow) -> float:
        with in_mode(unit, Mode.HARD):
            return float(reconstruction_loss(unit(flow.quantized_inputs[parts[1]]), flow.targets[parts[1]]))

    start = judged(*learn(quick(iterations=0), *parts))
    assert judged(*learn(quick(iterations=30, **wild), *parts)) <= start * (1 + 1e-6)


def test_where_gradients_are_no_numbers_a_unit_is_left_as_it_began(
    learn: Learn, quick: Quick, caplog: pytest.LogCaptureFixture
) -> None:
    """As behind a root, which has no gradient at 0."""
    first, last = torch.arange(12), torch.arange(12, 24)
    unit, flow = learn(quick(iterations=40, batch_size=8), first, last, spoilt=3)
    started, _ = learn(quick(iterations=0), first, last)
    with torch.no_grad(), in_mode(unit, Mode.HARD), in_mode(started, Mode.HARD):
        torch.testing.assert_close(unit(flow.quantized_inputs[last]), started(flow.quantized_inputs[last]))
    assert "unit: gradients are not finite" in caplog.text


def test_a_unit_stops_when_its_rounding_is_decided_and_the_loss_is_flat(
    learn: Learn, quick: Quick, caplog: pytest.LogCaptureFixture
) -> None:
    parts = torch.arange(4, 24), torch.arange(4)
    caplog.set_level(logging.DEBUG, "inc_clusterq")
    learn(quick(**LOUD, patience=20), *parts)
    assert "flat" not in caplog.text
    learn(quick(**LOUD, patience=1), *parts)
    assert "flat after" in caplog.text
