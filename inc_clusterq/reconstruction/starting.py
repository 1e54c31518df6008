"""Where the optimisation of a unit begins: its rounding, its step sizes and its biases, layer by layer in closed form."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from inc_clusterq.attributes import attribute
from inc_clusterq.reconstruction.graph import Unit
from inc_clusterq.reconstruction.moments import collect, collect_outputs, has_columns, input_pairs, outputs_of
from inc_clusterq.reconstruction.quantizers import QuantizedGraph
from inc_clusterq.reconstruction.second_order import best_rounding
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
    for layer in unit.layers:
        quantizer = getattr(graph_module, layer.quantizer) if layer.quantizer else None
        correction = quantized.correction(layer)
        rounded = quantizer in done  # by another layer that shares the weight
        if quantizer is None or not has_columns(layer) or (rounded and (correction is None or correction in done)):
            continue
        weight = attribute(graph_module, layer.weight)
        done.add(quantizer)
        rows = weight.reshape(layer.groups, layer.shape[0] // layer.groups, -1)
        pairs = input_pairs(graph_module, unit, layer, float_inputs, quantized_inputs, batch_size)
        if rows.shape[-1] > MOST_WEIGHTS:
            logger.info("%s has more than %d weights per row; it begins at the nearest integers", layer.name, MOST_WEIGHTS)
        else:
            moments = collect(pairs)
            if settings.start == "second_order" and not rounded:
                integers, scale, levels = best_rounding(rows.double(), moments, quantizer.bits)
                levels = integers + SOFTNESS * (levels - integers).clamp(-HALF, HALF)
                quantizer.restart(levels.reshape(weight.shape).to(weight.dtype), scale.flatten().to(weight.dtype))
        if correction is not None and correction not in done:
            done.add(correction)
            outputs = collect_outputs(rows, pairs) if rows.shape[-1] > MOST_WEIGHTS else outputs_of(rows.double(), moments)
            means = (outputs.wanted, outputs.input_mean, outputs.deviation)
            correction.start(quantizer.deployed(), *(tensor.to(weight.dtype) for tensor in means))
