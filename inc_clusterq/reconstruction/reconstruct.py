"""Block-wise reconstruction of a prepared graph (MRECG, arXiv 2303.11906; BRECQ, QDrop and AdaRound as settings).

Unit by unit, in order: each begins at a rounding found layer by layer in closed form (`starting.py`) and learns from there to
give the float network's outputs for the inputs that the quantized units before it make (`learning.py`). At the end of a unit
the rounding is hard, and its outputs feed the next one. After the last one, step sizes and biases learn end to end
(`end_to_end.py`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from inc_clusterq.determinism import repeatable
from inc_clusterq.difference import drawn_in
from inc_clusterq.layout import laid_out
from inc_clusterq.progress import SILENT, Progress
from inc_clusterq.reconstruction.capacity import homogeneous, modcap
from inc_clusterq.reconstruction.checkpoint import Chain, UnitStore
from inc_clusterq.reconstruction.end_to_end import learn_end_to_end
from inc_clusterq.reconstruction.fake_quantize import ActivationQuantizer, Mode, WeightQuantizer
from inc_clusterq.reconstruction.fisher import fisher_weights
from inc_clusterq.reconstruction.granularity import differences, explicit_units, merge_pairs, select_pairs, stack_chains
from inc_clusterq.reconstruction.graph import Unit, extract, join
from inc_clusterq.reconstruction.learning import (
    FORWARD_BATCH,
    Flow,
    keep_back,
    loss_as_deployed,
    optimise,
    power,
    reconstruction_loss,
)
from inc_clusterq.reconstruction.quantizers import (
    QuantizedGraph,
    in_mode,
    initialise_activations,
    lowest_bits,
    quantizers,
    set_mode,
    simulated,
)
from inc_clusterq.reconstruction.settings import ReconstructionSettings
from inc_clusterq.reconstruction.shelf import Shelf
from inc_clusterq.reconstruction.starting import start_unit
from inc_clusterq.reconstruction.views import count_views, with_views

logger = logging.getLogger(__name__)

GIGABYTE = 1e9


@dataclass(frozen=True)
class UnitReport:
    """What became of one unit."""

    name: str
    layers: tuple[str, ...]
    weight_bits: int  # the lowest of its weights; 32 where all are in float
    activation_bits: int  # the lowest of its activations
    capacity: float  # ModCap
    loss: float  # after hard rounding and before the pass end to end, over all calibration images with their views
    relative_loss: float  # the same, in units of the targets' own power
    seconds: float  # in whichever run computed it
    resumed: bool  # taken from disk, where this run or an earlier one had put it

    @property
    def lowest_bits(self) -> int:
        """Of its weights and activations."""
        return min(self.weight_bits, self.activation_bits)


@dataclass(frozen=True)
class EndToEnd:
    """What the last pass did: the network's loss over all calibration images with their views, by its outputs' power."""

    relative_loss_before: float
    relative_loss: float
    steps: int
    seconds: float
    resumed: bool  # taken from disk


@dataclass(frozen=True)
class Reconstruction:
    """A reconstructed graph's units, the base pass that chose them (granularity `loss`), and the pass end to end."""

    granularity: str
    units: tuple[UnitReport, ...]
    base: tuple[UnitReport, ...] = field(default=())
    end_to_end: EndToEnd | None = None
    views: int = 1  # of each calibration image, itself included


@repeatable()
def reconstruct(
    quantized: QuantizedGraph,
    inputs: Tensor,  # shape: (N, *shape), calibration images as the model takes them
    settings: ReconstructionSettings,
    *,
    seed: int,
    store: UnitStore,
    progress: Progress = SILENT,
) -> Reconstruction:
    """Optimise every unit of `quantized` in place and leave its quantizers in the mode that is deployed.

    Raises:
        ValueError: no calibration images, or explicit units that the graph cannot have.
    """
    if len(inputs) == 0:
        raise ValueError("reconstruction needs calibration images; none were given")
    views = count_views(inputs, settings)
    inputs = laid_out(with_views(inputs, views, torch.Generator().manual_seed(seed), mirror=settings.mirror))
    initialise_activations(quantized, inputs, FORWARD_BATCH)
    start = {name: tensor.clone() for name, tensor in quantized.graph_module.state_dict().items()}
    loop = _Loop(quantized, inputs, views, settings, seed, store, progress)
    granularity = settings.granularity or "modcap"
    base: tuple[UnitReport, ...] = ()
    if granularity == "loss":
        blocks = base_units(quantized, settings)
        run = loop.run(blocks)
        base, losses = run.reports, [report.loss for report in run.reports]
        if pairs := select_pairs(differences(blocks, losses, lambda first, second: True), settings.top_k, chain=True):
            quantized.graph_module.load_state_dict(start)  # units before the first merge come back from the store as they were
            run = loop.run(merge_pairs(blocks, pairs))
    else:
        units = base_units(quantized, settings)
        run = loop.run(_joined(units, quantized, settings) if granularity == "modcap" else units)
    last = loop.end_to_end(run)
    set_mode(quantized.graph_module, Mode.HARD)
    return Reconstruction(granularity, run.reports, base, last, views)


def base_units(quantized: QuantizedGraph, settings: ReconstructionSettings) -> Sequence[Unit]:
    """The units of a granularity, before any are joined by their capacity.

    Raises:
        ValueError: explicit units that the graph cannot have.
    """
    if settings.granularity == "layer":
        return quantized.units
    if settings.granularity == "explicit":
        return explicit_units(quantized.units, settings.explicit_units)
    return stack_chains(quantized.units, settings.stack_layers)


def _joined(blocks: Sequence[Unit], quantized: QuantizedGraph, settings: ReconstructionSettings) -> Sequence[Unit]:
    capacities = [modcap(unit, quantized.bits, settings.stride_factor) for unit in blocks]
    return merge_pairs(blocks, select_pairs(differences(blocks, capacities, homogeneous), settings.top_k, chain=False))


@dataclass(frozen=True)
class _Run:
    """One pass over all units, and where it ended."""

    reports: tuple[UnitReport, ...]
    chain: Chain
    targets: Tensor  # the float network's outputs
    outputs: Tensor  # the quantized network's


@dataclass(frozen=True)
class _Loop:
    """One pass over a list of units; everything but the list stays the same between passes."""

    quantized: QuantizedGraph
    inputs: Tensor  # with their views
    views: int  # of each image
    settings: ReconstructionSettings
    seed: int
    store: UnitStore
    progress: Progress

    def run(self, units: Sequence[Unit]) -> _Run:
        """Reconstruct `units` in order, each from what the units before it hand on."""
        float_inputs = quantized_inputs = self.inputs
        shelf = Shelf(self.settings.memory_budget * GIGABYTE, self.store.folder)
        chain = self.store.start(self.quantized, self.inputs, self.settings, self.seed)
        reports = []
        settled: set[nn.Module] = set()
        count, share = len(self.inputs) // self.views, self.settings.validation_share
        images = keep_back(count, share, self.seed, self.inputs.device, self.views)
        with self.progress.stage("Reconstructing", len(units) * self.settings.iterations) as stage:
            for number, unit in enumerate(units, 1):
                began = time.perf_counter()
                module = extract(self.quantized.graph_module, unit)
                targets = _forward(module, float_inputs, Mode.FLOAT, self.inputs.device, shelf)
                shared = [number for number, part in enumerate(simulated(module)) if part in settled]
                bits = [quantizer.bits for quantizer in quantizers(module)]
                chain = chain.next(unit, f"{bits}{f' settled {shared}' if shared else ''}")
                label = f"unit {number}/{len(units)} {unit.name}"
                found = chain.restore(module)
                if found is not None:
                    stage.skip(self.settings.iterations, f"{label} (from disk)")
                else:
                    weights = self._weights(units[number:], targets, chain, shelf)
                    flow = Flow(float_inputs, quantized_inputs, targets, weights, *images)
                    start_unit(self.quantized, unit, float_inputs, quantized_inputs, self.settings, settled, FORWARD_BATCH)
                    optimise(module, flow, self.settings, chain.generator(self.inputs.device), stage, label, settled)
                    chain.keep(module, time.perf_counter() - began)
                    del flow, weights  # the next unit's take their place in memory
                settled.update(simulated(module))
                outputs = _forward(module, quantized_inputs, Mode.HARD, self.inputs.device, shelf)
                loss, by = _mean_loss(outputs, targets), _mean_power(targets, last=number == len(units))
                reports.append(
                    UnitReport(
                        unit.name,
                        tuple(layer.name for layer in unit.layers),
                        lowest_bits(module, WeightQuantizer),
                        lowest_bits(module, ActivationQuantizer),
                        modcap(unit, self.quantized.bits, self.settings.stride_factor),
                        loss,
                        loss / by if by else 0.0,
                        time.perf_counter() - began if found is None else found,
                        found is not None,
                    )
                )
                logger.info("%s: loss %.4g in %.1f s", label, loss, reports[-1].seconds)
                float_inputs, quantized_inputs = targets, outputs
        return _Run(tuple(reports), chain, float_inputs, quantized_inputs)

    def end_to_end(self, run: _Run) -> EndToEnd | None:
        """Let step sizes and biases of the whole network learn, behind a pass over its units; None without a step."""
        began = time.perf_counter()
        by = _mean_power(run.targets, last=True) or 1.0
        before = _mean_loss(run.outputs, run.targets)
        steps = self.settings.end_to_end_steps(before / by)
        if not steps:
            return None
        whole = join(list(self.quantized.units))
        module = extract(self.quantized.graph_module, whole)
        how = f" {steps} {self.settings.end_to_end_learning_rate} {self.settings.end_to_end_features}"
        chain = run.chain.next(whole, how)
        with self.progress.stage("Learning end to end", steps) as stage:
            found = chain.restore(module)
            if found is not None:
                stage.skip(steps, "from disk")
                after = loss_as_deployed(module, self.inputs, run.targets)
            else:
                after = learn_end_to_end(module, self.inputs, run.targets, self.settings, steps, before, chain, stage)
                chain.keep(module, time.perf_counter() - began)
        logger.info("end to end: loss %.4g, before %.4g", after, before)
        seconds = time.perf_counter() - began if found is None else found
        return EndToEnd(before / by, after / by, steps, seconds, found is not None)

    def _weights(self, behind: Sequence[Unit], targets: Tensor, chain: Chain, shelf: Shelf) -> Tensor | None:
        """Weights of the loss of the unit before `behind`, as the settings ask for."""
        if self.settings.loss == "squared" or not self.settings.iterations:
            return None
        rest = extract(self.quantized.graph_module, join(list(behind))) if behind else None
        return fisher_weights(rest, targets, chain.generator(self.inputs.device), FORWARD_BATCH, shelf)


def _mean_loss(outputs: Tensor, targets: Tensor) -> float:
    """The loss over all calibration images, a batch at a time."""
    total = 0.0
    for found, y in zip(outputs.split(FORWARD_BATCH), targets.split(FORWARD_BATCH), strict=True):
        total += float(reconstruction_loss(found.to(y.device), y)) * len(y)
    return total / len(targets)


def _mean_power(targets: Tensor, *, last: bool) -> float:
    """What relative losses are relative to; where the `last` unit's targets hold masked classes, these aside."""
    return sum(float(power(drawn_in(y) if last else y)) * len(y) for y in targets.split(FORWARD_BATCH)) / len(targets)


@torch.no_grad()
def _forward(module: nn.Module, inputs: Tensor, mode: Mode, device: torch.device, shelf: Shelf) -> Tensor:
    """Outputs for all inputs, in batches."""
    outputs: Tensor | None = None
    with in_mode(module, mode):
        for begin in range(0, len(inputs), FORWARD_BATCH):
            batch = module(inputs[begin : begin + FORWARD_BATCH].to(device))
            if outputs is None:
                outputs = shelf.empty((len(inputs), *batch.shape[1:]), batch)
            outputs[begin : begin + FORWARD_BATCH] = batch
    assert outputs is not None
    return outputs
