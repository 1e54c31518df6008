from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from inc_clusterq.attributes import attribute
from inc_clusterq.progress import NO_STAGE
from inc_clusterq.reconstruction.bits import BitPlan, LayerBits
from inc_clusterq.reconstruction.fake_quantize import Mode
from inc_clusterq.reconstruction.graph import extract, join
from inc_clusterq.reconstruction.quantizers import QuantizedGraph, in_mode, initialise_activations, simulated
from inc_clusterq.reconstruction.reconstruct import base_units
from inc_clusterq.reconstruction.sensitivity import IMAGES, contributions, sensitivities
from inc_clusterq.reconstruction.settings import ReconstructionSettings

Network = Callable[[str], tuple[nn.Module, Tensor]]
Quantized = Callable[..., QuantizedGraph]
NEAREST = ReconstructionSettings(start="nearest", correct_bias=False, granularity="block")


def measured(graph: QuantizedGraph, inputs: Tensor, settings: ReconstructionSettings = NEAREST) -> list[float]:
    return sensitivities(graph, base_units(graph, settings), inputs, settings, NO_STAGE)[0]


@pytest.mark.parametrize("name", ["chain", "residual", "depthwise", "squeeze_excite", "concat", "tied"])
@torch.no_grad()
def test_it_is_the_error_of_the_outputs_with_one_unit_quantized_and_all_else_in_float(
    quantized: Quantized, network: Network, name: str
) -> None:
    module, inputs = network(name)
    graph, other = quantized(name, NEAREST), quantized(name, NEAREST)
    units = base_units(other, NEAREST)
    alone, together = sensitivities(graph, base_units(graph, NEAREST), inputs, NEAREST, NO_STAGE)
    initialise_activations(other, inputs, len(inputs))
    wanted = module(inputs)
    for sensitivity, quantized_part in zip([*alone, together], [*units, join(list(units))], strict=True):
        with in_mode(extract(other.graph_module, quantized_part), Mode.HARD):
            error = (other.graph_module(inputs) - wanted).square().mean() / wanted.var(0, correction=0).mean()
        assert sensitivity == pytest.approx(float(error), rel=1e-3)
        assert sensitivity > 0


@pytest.mark.parametrize(("block", "number"), [("one", 1), ("two", 2)])
def test_the_unit_with_fewer_bits_is_the_most_sensitive_wherever_it_lies(
    quantized: Quantized, network: Network, block: str, number: int
) -> None:
    plan = BitPlan(8, 8, layers={f"{block}.conv{i}.0": LayerBits(2, 2) for i in (1, 2)})
    found = measured(quantized("residual", NEAREST, plan), network("residual")[1])
    assert found.index(max(found)) == number


def test_what_the_outputs_do_not_depend_on_has_none(quantized: Quantized, network: Network) -> None:
    graph = quantized("chain", NEAREST)
    with torch.no_grad():
        attribute(graph.graph_module, graph.units[-1].layers[-1].weight).zero_()
    assert max(measured(graph, network("chain")[1])[:-1]) == 0


def test_a_start_that_keeps_to_the_outputs_makes_units_less_sensitive(quantized: Quantized, network: Network) -> None:
    inputs, second_order = network("residual")[1], ReconstructionSettings(granularity="block")
    assert sum(measured(quantized("residual"), inputs, second_order)) < sum(measured(quantized("residual", NEAREST), inputs))


def test_the_first_images_are_enough_and_the_graph_is_in_float_afterwards(quantized: Quantized, network: Network) -> None:
    module, inputs = network("chain")
    images = torch.cat([inputs] * (IMAGES // len(inputs) + 1))
    graph = quantized("chain", NEAREST)
    assert measured(graph, images) == measured(quantized("chain", NEAREST), images[:IMAGES])
    assert {part.mode for part in simulated(graph.graph_module)} == {Mode.FLOAT}
    with torch.no_grad():
        torch.testing.assert_close(graph.graph_module(inputs), module(inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("alone", "together", "expected"),
    [
        ([4.0, 2.0, 1.0], 3.0, [1.0, 1.0, 1.0]),  # every unit hands on a half
        ([9.0, 3.0, 16.0], 23.3125, [9 * 0.75**2, 3 * 0.75, 16.0]),
        ([4.0, 2.0, 1.0], 9.0, [4.0, 2.0, 1.0]),  # what units lose does not shrink
        ([4.0, 2.0, 1.0], 0.1, [1.0, 1.0, 1.0]),  # no unit takes away more than half
        ([0.0, 0.0], 0.0, [0.0, 0.0]),
    ],
)
def test_every_unit_hands_on_the_share_with_which_all_of_them_add_up(
    alone: list[float], together: float, expected: list[float]
) -> None:
    assert contributions(alone, together) == pytest.approx(expected, rel=1e-6)
