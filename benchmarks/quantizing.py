"""Quantized networks as the benchmark scripts need them: by one trial in which nothing is selected, or not yet learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from arguments import Options
from neural_compressor.torch.algorithms.pt2e_quant.core import W8A8PT2EQuantizer
from neural_compressor.torch.export import export
from neural_compressor.torch.quantization import INT8StaticQuantConfig
from torch import Tensor, nn

from inc_clusterq.adaptors.neural_compressor import NeuralCompressorAdaptor
from inc_clusterq.reconstruction.bits import BitPlan
from inc_clusterq.reconstruction.quantizers import QuantizedGraph, initialise_activations, install_quantizers
from inc_clusterq.reconstruction.settings import ReconstructionSettings
from inc_clusterq.tuning import Trial, TuningOutcome, TuningRequest

BATCH = 32  # images per calibration call, the default of the YAML


def reconstructed(
    exported: nn.Module,
    images: Tensor,
    weight: int,
    activation: int,
    seed: int,
    options: Options,
    **keys: Any,
) -> nn.Module:
    """Ours, in one trial, so that nothing is selected: ModCap granularity at the preset's effort, with `keys` changed."""
    preset = ReconstructionSettings.PRESETS[options.preset]
    settings = ReconstructionSettings.model_validate({**preset, "granularity": "modcap", **keys})
    return one_trial(exported, images, weight, activation, settings, seed).model


def one_trial(
    exported: nn.Module,
    images: Tensor,
    weight: int,
    activation: int,
    settings: ReconstructionSettings,
    seed: int,
    workspace: Path | None = None,
    fallback_units: int = 0,
) -> TuningOutcome:
    """A reconstruction through the host's own loop, scored by nothing."""
    request = TuningRequest(weight, activation, settings, max_trials=1, seed=seed)
    trials = [Trial(settings.granularity or "", settings, fallback_units)]
    adaptor = NeuralCompressorAdaptor()
    return adaptor.tune(exported, images.split(BATCH), trials, request, score=lambda model: 1.0, workspace=workspace)


def quantized_graph(
    module: nn.Module, images: Tensor, bits: int, settings: ReconstructionSettings, batch: int
) -> QuantizedGraph:
    """A module that is no network of the data folder with learnable quantizers, set from what it does with `images`."""
    exported = export(module, (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=len(images))},))
    prepared = W8A8PT2EQuantizer(quant_config=INT8StaticQuantConfig()).prepare(exported)
    quantized = install_quantizers(prepared, BitPlan(bits, bits), settings)
    initialise_activations(quantized, images, batch)
    return quantized
