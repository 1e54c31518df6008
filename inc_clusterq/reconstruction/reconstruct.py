"""Block-wise reconstruction of a prepared graph (MRECG, arXiv 2303.11906; BRECQ, QDrop and AdaRound as settings).

Unit by unit, in order:   min over rounding and step sizes of  E || f_i(x~_i) - y_i ||^2 + lambda R(V)
where y_i is the float network's output of unit i, and x~_i the unit's input as the quantized units before it make it,
mixed element by element with the float input (QDrop). The squared error is summed over channels and averaged over
batch and space. Each unit begins at a rounding found layer by layer in closed form (`starting.py`), and goes back to it
where learning has not lowered the loss. At the end of a unit the rounding is hard, and its outputs feed the next one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from inc_clusterq.progress import SILENT, Progress, Stage
from inc_clusterq.reconstruction.capacity import homogeneous, modcap
from inc_clusterq.reconstruction.checkpoint import Chain, UnitStore
from inc_clusterq.reconstruction.dropping import draw_mask
from inc_clusterq.reconstruction.fake_quantize import ActivationQuantizer, BiasCorrection, Mode, WeightQuantizer
from inc_clusterq.reconstruction.fisher import fisher_weights
from inc_clusterq.reconstruction.granularity import differences, explicit_units, merge_pairs, select_pairs, stack_chains
from inc_clusterq.reconstruction.graph import Unit, extract, join
from inc_clusterq.reconstruction.quantizers import (
    QuantizedGraph,
    in_mode,
    initialise_activations,
    quantizers,
    set_mode,
    simulated,
)
from inc_clusterq.reconstruction.rounding import beta_at, regulariser
from inc_clusterq.reconstruction.settings import ReconstructionSettings
from inc_clusterq.reconstruction.shelf import Shelf
from inc_clusterq.reconstruction.starting import start_unit

logger = logging.getLogger(__name__)

FORWARD_BATCH = 64  # images per forward pass outside the optimisation
GIGABYTE = 1e9


@dataclass(frozen=True)
class UnitReport:
    """What became of one unit."""

    name: str
    layers: tuple[str, ...]
    lowest_bits: int  # of its weights and activations
    capacity: float  # ModCap
    loss: float  # reconstruction loss after hard rounding, over all calibration images
    relative_loss: float  # the same, in units of the targets' own power
    seconds: float
    resumed: bool  # taken from disk


@dataclass(frozen=True)
class Reconstruction:
    """A reconstructed graph's units, and the base pass that chose them (granularity `loss`)."""

    granularity: str
    units: tuple[UnitReport, ...]
    base: tuple[UnitReport, ...] = field(default=())


@dataclass
class _Flow:
    """Inputs of the current unit: as the float network makes them, and as the quantized one does."""

    float_inputs: Tensor
    quantized_inputs: Tensor
    targets: Tensor  # the float network's outputs of the unit
    weights: Tensor | None = None  # of the loss, shape of the targets; None: 1


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
    initialise_activations(quantized, inputs, FORWARD_BATCH)
    start = {name: tensor.clone() for name, tensor in quantized.graph_module.state_dict().items()}
    loop = _Loop(quantized, inputs, settings, seed, store, progress)
    granularity = settings.granularity or "modcap"
    blocks = stack_chains(quantized.units, settings.stack_layers)
    if granularity == "layer":
        return Reconstruction(granularity, loop.run(quantized.units))
    if granularity == "block":
        return Reconstruction(granularity, loop.run(blocks))
    if granularity == "explicit":
        return Reconstruction(granularity, loop.run(explicit_units(quantized.units, settings.explicit_units)))
    if granularity == "modcap":
        capacities = [modcap(unit, quantized.bits, settings.stride_factor) for unit in blocks]
        pairs = select_pairs(differences(blocks, capacities, homogeneous), settings.top_k, chain=False)
        return Reconstruction(granularity, loop.run(merge_pairs(blocks, pairs)))
    base = loop.run(blocks)
    losses = [report.loss for report in base]
    pairs = select_pairs(differences(blocks, losses, lambda first, second: True), settings.top_k, chain=True)
    if not pairs:
        return Reconstruction(granularity, base, base)
    quantized.graph_module.load_state_dict(start)  # units before the first merge come back from the store as they were
    return Reconstruction(granularity, loop.run(merge_pairs(blocks, pairs)), base)


@dataclass(frozen=True)
class _Loop:
    """One pass over a list of units; everything but the list stays the same between passes."""

    quantized: QuantizedGraph
    inputs: Tensor
    settings: ReconstructionSettings
    seed: int
    store: UnitStore
    progress: Progress

    def run(self, units: Sequence[Unit]) -> tuple[UnitReport, ...]:
        """Reconstruct `units` in order, each from what the units before it hand on."""
        float_inputs = quantized_inputs = self.inputs
        shelf = Shelf(self.settings.memory_budget * GIGABYTE, self.store.folder)
        chain = self.store.start(self.quantized, self.inputs, self.settings, self.seed)
        reports = []
        settled: set[nn.Module] = set()
        with self.progress.stage("Reconstructing", len(units) * self.settings.iterations) as stage:
            for number, unit in enumerate(units, 1):
                began = time.perf_counter()
                module = extract(self.quantized.graph_module, unit)
                targets = _forward(module, float_inputs, Mode.FLOAT, self.inputs.device, shelf)
                chain = chain.next(unit)
                label = f"unit {number}/{len(units)} {unit.name}"
                resumed = chain.restore(module)
                if resumed:
                    stage.advance(self.settings.iterations, f"{label} (from disk)")
                else:
                    weights = self._weights(units[number:], targets, chain, shelf)
                    flow = _Flow(float_inputs, quantized_inputs, targets, weights)
                    start_unit(self.quantized, unit, float_inputs, quantized_inputs, self.settings, settled, FORWARD_BATCH)
                    optimise(module, flow, self.settings, chain.generator(self.inputs.device), stage, label, settled)
                    chain.keep(module)
                settled.update(simulated(module))
                outputs = _forward(module, quantized_inputs, Mode.HARD, self.inputs.device, shelf)
                loss, power = _mean_loss(outputs, targets), _mean_loss(None, targets)
                reports.append(
                    UnitReport(
                        unit.name,
                        tuple(layer.name for layer in unit.layers),
                        min((quantizer.bits for quantizer in quantizers(module)), default=32),  # 32: a unit in float
                        modcap(unit, self.quantized.bits, self.settings.stride_factor),
                        loss,
                        loss / power if power else 0.0,
                        time.perf_counter() - began,
                        resumed,
                    )
                )
                logger.info("%s: loss %.4g in %.1f s", label, loss, reports[-1].seconds)
                float_inputs, quantized_inputs = targets, outputs
        set_mode(self.quantized.graph_module, Mode.HARD)
        return tuple(reports)

    def _weights(self, behind: Sequence[Unit], targets: Tensor, chain: Chain, shelf: Shelf) -> Tensor | None:
        """Weights of the loss of the unit before `behind`, as the settings ask for."""
        if self.settings.loss == "squared" or not self.settings.iterations:
            return None
        rest = extract(self.quantized.graph_module, join(list(behind))) if behind else None
        return fisher_weights(rest, targets, chain.generator(self.inputs.device), FORWARD_BATCH, shelf)


def reconstruction_loss(outputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """|| y - y' ||^2 summed over channels, mean over batch and space; shapes (N, C, ...)."""
    error = (outputs - targets).square()
    return (error if weights is None else error * weights).sum(1).mean()


def optimise(
    module: fx.GraphModule,
    flow: _Flow,
    settings: ReconstructionSettings,
    generator: torch.Generator,
    stage: Stage,
    label: str,
    settled: set[nn.Module],
) -> None:
    """Learn rounding, step sizes and biases of one unit, and leave them hard.

    What a unit before this one has `settled` stays: the host may share a quantizer, and its first unit relies on it.
    """
    learned = nn.ModuleList(part for part in simulated(module) if part not in settled)
    if not settings.iterations:
        _harden(module, learned, learned=False)
        return
    if not len(learned):
        stage.advance(settings.iterations, label)
        return
    start = {name: tensor.clone() for name, tensor in learned.state_dict().items()}
    start_loss = _hard_loss(module, flow, generator.device)
    activations = [part for part in learned if isinstance(part, ActivationQuantizer)]
    with (
        _learning(activations, settings.drop_probability, generator),
        in_mode(module, Mode.HARD),
        in_mode(learned, Mode.LEARN),
        torch.enable_grad(),
    ):
        _descend(module, learned, flow, settings, generator, stage, label)
    _harden(module, learned, learned=True)
    loss = _hard_loss(module, flow, generator.device)
    if not loss <= start_loss:
        logger.debug("%s: learning raised the loss from %.4g to %.4g; the start is kept", label, start_loss, loss)
        learned.load_state_dict(start)


def _harden(module: fx.GraphModule, parts: nn.ModuleList, *, learned: bool) -> None:
    """Fix what is deployed; corrections last, since they follow the weights."""
    for part in parts:
        if isinstance(part, WeightQuantizer):
            part.harden(learned)
        elif isinstance(part, ActivationQuantizer):
            part.fix(*part.deployed())
    for node in module.graph.nodes:
        called = getattr(module, str(node.target), None) if node.op == "call_module" else None
        if isinstance(called, BiasCorrection) and called in set(parts):
            called.harden(getattr(module, str(node.args[1].target)).deployed())


@torch.no_grad()
def _hard_loss(module: fx.GraphModule, flow: _Flow, device: torch.device) -> float:
    """The loss of the unit as it would be deployed now, over all calibration images."""
    total = 0.0
    with in_mode(module, Mode.HARD):
        for chosen in torch.arange(len(flow.targets), device=device).split(FORWARD_BATCH):
            outputs = module(_take(flow.quantized_inputs, chosen))
            total += float(reconstruction_loss(outputs, _take(flow.targets, chosen), _weights(flow, chosen))) * len(chosen)
    return total / len(flow.targets)


def _mean_loss(outputs: Tensor | None, targets: Tensor) -> float:
    """The loss over all calibration images, a batch at a time; that of zero for None."""
    total = 0.0
    for begin in range(0, len(targets), FORWARD_BATCH):
        y = targets[begin : begin + FORWARD_BATCH]
        found = torch.zeros_like(y) if outputs is None else outputs[begin : begin + FORWARD_BATCH].to(y.device)
        total += float(reconstruction_loss(found, y)) * len(y)
    return total / len(targets)


def _descend(
    module: fx.GraphModule,
    learned: nn.ModuleList,
    flow: _Flow,
    settings: ReconstructionSettings,
    generator: torch.Generator,
    stage: Stage,
    label: str,
) -> None:
    steps, images = settings.iterations, len(flow.targets)
    weights = [part for part in learned if isinstance(part, WeightQuantizer)]
    activations = [part for part in learned if isinstance(part, ActivationQuantizer)]
    biases = [part.c for part in learned if isinstance(part, BiasCorrection)]
    # The host leaves some operators' weights in float (transposed convolutions), and an optimiser wants a tensor.
    rounding = torch.optim.Adam([weight.v for weight in weights] or [torch.zeros(())], lr=settings.weight_learning_rate)
    scales = [activation.scale_shift for activation in activations]
    scales += [activation.zero_point_shift for activation in activations if not activation.one_sided]
    scales += [weight.scale_shift for weight in weights if weight.joint]
    groups: list[dict[str, Any]] = [
        {"params": scales or [torch.zeros(())], "lr": settings.activation_learning_rate},
        {"params": biases, "lr": settings.bias_learning_rate},
    ]
    stepping = torch.optim.Adam([group for group in groups if group["params"]])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(stepping, T_max=steps)
    report_every = max(1, steps // 20)
    for step in range(steps):
        chosen = torch.randint(images, (min(settings.batch_size, images),), generator=generator, device=generator.device)
        x, y = _mixed(flow, chosen, settings.drop_probability, generator), _take(flow.targets, chosen)
        loss = reconstruction_loss(module(x), y, _weights(flow, chosen))
        beta = beta_at(step, steps, settings.beta_start, settings.beta_end, settings.warm_up)
        total = loss
        if beta is not None:
            total = loss + settings.rounding_weight * sum(regulariser(weight.v, beta) for weight in weights)
        rounding.zero_grad(set_to_none=True)
        stepping.zero_grad(set_to_none=True)
        total.backward()
        rounding.step()
        stepping.step()
        schedule.step()
        if (step + 1) % report_every == 0 or step + 1 == steps:
            stage.advance(report_every if (step + 1) % report_every == 0 else steps % report_every, f"{label} loss {loss:.4g}")


def _mixed(flow: _Flow, chosen: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """x~: the quantized input with some of its elements as in the float network (QDrop)."""
    x = _take(flow.quantized_inputs, chosen)
    if not probability:
        return x
    return x.lerp_(_take(flow.float_inputs, chosen), draw_mask(x, probability, generator))


def _weights(flow: _Flow, chosen: Tensor) -> Tensor | None:
    return None if flow.weights is None else _take(flow.weights, chosen)


def _take(tensor: Tensor, chosen: Tensor) -> Tensor:
    """Images of a tensor that may be mapped, on the device of their numbers."""
    return tensor[chosen.to(tensor.device)].to(chosen.device)


@contextmanager
def _learning(activations: list[ActivationQuantizer], probability: float, generator: torch.Generator) -> Iterator[None]:
    """Activation quantizers drop elements, with randomness from `generator`."""
    for activation in activations:
        activation.drop_probability, activation.generator = probability, generator
    try:
        yield
    finally:
        for activation in activations:
            activation.drop_probability, activation.generator = 0.0, None


@torch.no_grad()
def _forward(module: fx.GraphModule, inputs: Tensor, mode: Mode, device: torch.device, shelf: Shelf) -> Tensor:
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
