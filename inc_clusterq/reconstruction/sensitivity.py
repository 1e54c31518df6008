"""How much of what is off at the network's outputs comes from each unit, which tells where more bits help most.

    S_i = E || f_i(x) - f(x) ||^2 / E || f(x) - E f(x) ||^2
with f the float network and f_i the same with unit i alone quantized, its weights rounded as its reconstruction would begin.
So the sensitivities of ZeroQ (arXiv 2001.00281), with the distance of the outputs in place of their divergence, since outputs
need not be logits. Units are reconstructed one after the other, though, and each makes up for some of what those before it
have lost. So from unit i of n there comes
    S_i r^(n - i),   with r such that all of them add up to the S of the network whose units have all begun in this way
at most 1: every unit hands on the same share of what it is given.

A unit's own loss does not tell this: what earlier units lost is in it too, so that it grows with depth, and what becomes of it
in the layers behind is not.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from inc_clusterq.determinism import repeatable
from inc_clusterq.difference import drawn_in
from inc_clusterq.progress import Progress, Stage
from inc_clusterq.reconstruction.bits import FULL_BITS
from inc_clusterq.reconstruction.fake_quantize import ActivationQuantizer, Mode, WeightQuantizer
from inc_clusterq.reconstruction.graph import Unit, extract, join
from inc_clusterq.reconstruction.quantizers import (
    QuantizedGraph,
    in_mode,
    initialise_activations,
    lowest_bits,
    simulated,
)
from inc_clusterq.reconstruction.reconstruct import base_units
from inc_clusterq.reconstruction.settings import ReconstructionSettings
from inc_clusterq.reconstruction.starting import start_unit

logger = logging.getLogger(__name__)

IMAGES = 64  # are passed at once, for every unit from there to the end
EPSILON = 1e-12  # variance of outputs that do not vary
LEAST_SHARE = 0.5  # of what a unit is given that it hands on: less would leave nothing but the last units
HALVINGS = 30


def most_harmful(
    quantized: QuantizedGraph, inputs: Tensor, settings: ReconstructionSettings, count: int, progress: Progress
) -> list[Unit]:
    """The `count` units that the most comes from, or all, among those that have fewer bits than they can get."""
    units = base_units(quantized, settings)
    with progress.stage("Measuring sensitivities", len(units)) as stage:
        found = contributions(*sensitivities(quantized, units, inputs, settings, stage))
    candidates = [(harm, unit) for harm, unit in zip(found, units, strict=True) if can_be_raised(unit, quantized, settings)]
    most = sorted(candidates, key=lambda candidate: -candidate[0])[:count]
    for harm, unit in most:
        logger.info(
            "%s gets %d bits; %.3g of what is off at the outputs comes from it", unit.name, FULL_BITS, harm / (sum(found) or 1)
        )
    return [unit for _, unit in most]


def can_be_raised(unit: Unit, quantized: QuantizedGraph, settings: ReconstructionSettings) -> bool:
    """Whether the unit has fewer bits than one that was raised to `FULL_BITS`."""
    module = extract(quantized.graph_module, unit)
    weight, activation = lowest_bits(module, WeightQuantizer), lowest_bits(module, ActivationQuantizer)
    return weight < min(FULL_BITS, settings.weight_ceiling) or activation < FULL_BITS


@repeatable()
@torch.no_grad()
def sensitivities(
    quantized: QuantizedGraph,
    units: Sequence[Unit],  # all of the network, in order
    inputs: Tensor,  # shape: (N, *shape), calibration images; the first 64 of them are used
    settings: ReconstructionSettings,
    stage: Stage,  # of as many steps as there are units
) -> tuple[list[float], float]:
    """S of each unit alone, and of all together; at least 0. The quantizers are set on the way, and left in float mode."""
    float_inputs = quantized_inputs = inputs[:IMAGES]
    initialise_activations(quantized, float_inputs, IMAGES)
    alone: list[float] = []
    settled: set[nn.Module] = set()
    with in_mode(quantized.graph_module, Mode.FLOAT):
        wanted = quantized.graph_module(float_inputs)
        usual = drawn_in(wanted)
        variance = max(float((usual - usual.mean(0)).square().mean()), EPSILON)
        for number, unit in enumerate(units):
            module = extract(quantized.graph_module, unit)
            to_the_end = extract(quantized.graph_module, join(list(units[number:])))
            start_unit(quantized, unit, float_inputs, float_inputs, settings, settled, IMAGES)
            with in_mode(module, Mode.HARD):
                alone.append(float((to_the_end(float_inputs) - wanted).square().mean()) / variance)
            start_unit(quantized, unit, float_inputs, quantized_inputs, settings, settled, IMAGES)
            with in_mode(module, Mode.HARD):
                quantized_inputs = module(quantized_inputs)
            settled.update(simulated(module))
            float_inputs = module(float_inputs)
            stage.advance(1)
    return alone, float((quantized_inputs - wanted).square().mean()) / variance


def contributions(alone: Sequence[float], together: float) -> list[float]:
    """What comes from each unit of what is off behind the last: S_i r^(n - i)."""
    low, high = LEAST_SHARE, 1.0
    for _ in range(HALVINGS):
        share = (low + high) / 2
        low, high = (low, share) if sum(_handed_on(alone, share)) > together else (share, high)
    return _handed_on(alone, high)


def _handed_on(alone: Sequence[float], share: float) -> list[float]:
    return [sensitivity * share ** (len(alone) - number) for number, sensitivity in enumerate(alone, 1)]
