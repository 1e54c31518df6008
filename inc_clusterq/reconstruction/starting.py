"""Where the optimisation of a unit begins: its rounding, its step sizes and its biases, layer by layer in closed form."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from inc_clusterq.reconstruction.graph import Unit, attribute
from inc_clusterq.reconstruction.moments import collect, collect_outputs, has_columns, outputs_of
from inc_clusterq.reconstruction.quantizers import QuantizedGraph
from inc_clusterq.reconstruction.second_order import DISTRUSTFUL_PULL, PULL, best_rounding
from inc_clusterq.reconstruction.settings import ReconstructionSettings

logger = logging.getLogger(__name__)

# The soft weights begin this share of the way from the integers to the real values that these stand for: near enough to the
# integers that the loss is theirs, and on the side to which a change of rounding would be cheapest.
SOFTNESS = 0.3
MOST_WEIGHTS = 5000  # per row, since their moments are a square matrix; 512 channels under a 3x3 kernel are 4608
HALF = 0.499  # at most: farther away is nearer to another integer


@torch.no_grad()
def start_unit(
    quantized: QuantizedGraph,
    unit: Unit,
    float_inputs: Tensor,  # of the unit, shape: (N, ...)
    quantized_inputs: Tensor,
    settings: ReconstructionSettings,
    settled: set[nn.Module],
    batch_size: int,
) -> None:
    """Set the weights' quantizers and the bias corrections of a unit; what is `settled` stays as it is."""
    if settings.start == "nearest" and not settings.correct_bias:
        return
    graph_module, done = quantized.graph_module, set(settled)
    pull = DISTRUSTFUL_PULL if settings.mixtures else PULL
    for layer in unit.layers:
        quantizer = getattr(graph_module, layer.quantizer) if layer.quantizer else None
        if quantizer is None or quantizer in done or not has_columns(layer):
            continue
        done.add(quantizer)
        weight = attribute(graph_module, layer.weight)
        if layer.parameters // layer.shape[0] > MOST_WEIGHTS:
            logger.info("%s has more than %d weights per row; it begins at the nearest integers", layer.name, MOST_WEIGHTS)
            outputs = collect_outputs(graph_module, unit, layer, float_inputs, quantized_inputs, batch_size)
        else:
            moments = collect(graph_module, unit, layer, float_inputs, quantized_inputs, batch_size)
            rows = weight.double().reshape(layer.groups, -1, moments.mean.shape[-1])
            if settings.start == "second_order":
                integers, scale, levels = best_rounding(rows, moments, quantizer.bits, pull)
                levels = integers + SOFTNESS * (levels - integers).clamp(-HALF, HALF)
                quantizer.restart(levels.reshape(weight.shape).to(weight.dtype), scale.flatten().to(weight.dtype))
            outputs = outputs_of(rows, moments)
        correction = quantized.correction(layer)
        if correction is not None and correction not in done:
            done.add(correction)
            means = (outputs.wanted, outputs.input_mean, outputs.deviation)
            correction.start(quantizer.deployed(), *(tensor.to(weight.dtype) for tensor in means))
