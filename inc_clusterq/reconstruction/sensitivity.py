"""How much each unit by itself spoils the network's outputs, which tells where more bits help most.

    S_i = E || f_i(x) - f(x) ||^2 / E || f(x) - E f(x) ||^2
with f the float network and f_i the same with unit i alone quantized, its weights rounded as its reconstruction would begin.
So the sensitivities of ZeroQ (arXiv 2001.00281), with the distance of the outputs in place of their divergence, since outputs
need not be logits.

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


def most_sensitive(
    quantized: QuantizedGraph, inputs: Tensor, settings: ReconstructionSettings, count: int, progress: Progress
) -> list[Unit]:
    """The `count` units of the largest S, or all, among those that have fewer bits than they can get; for S see below."""
    units = base_units(quantized, settings)
    with progress.stage("Measuring sensitivities", len(units)) as stage:
        found = sensitivities(quantized, units, inputs, settings, stage)
    candidates = [
        (sensitivity, unit) for sensitivity, unit in zip(found, units, strict=True) if can_be_raised(unit, quantized, settings)
    ]
    most = sorted(candidates, key=lambda candidate: -candidate[0])[:count]
    for sensitivity, unit in most:
        logger.info("%s gets %d bits; alone it spoils the outputs by %.3g", unit.name, FULL_BITS, sensitivity)
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
) -> list[float]:
    """S of each unit, at least 0. The quantizers of `quantized` are set on the way, and are left in float mode."""
    entering = inputs[:IMAGES]
    initialise_activations(quantized, entering, IMAGES)
    found: list[float] = []
    settled: set[nn.Module] = set()
    with in_mode(quantized.graph_module, Mode.FLOAT):
        wanted = quantized.graph_module(entering)
        usual = drawn_in(wanted)
        variance = max(float((usual - usual.mean(0)).square().mean()), EPSILON)
        for number, unit in enumerate(units):
            module = extract(quantized.graph_module, unit)
            to_the_end = extract(quantized.graph_module, join(list(units[number:])))
            start_unit(quantized, unit, entering, entering, settings, settled, IMAGES)
            settled.update(simulated(module))
            with in_mode(module, Mode.HARD):
                found.append(float((to_the_end(entering) - wanted).square().mean()) / variance)
            entering = module(entering)
            stage.advance(1)
    return found
