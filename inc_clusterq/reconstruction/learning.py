"""The optimisation of one unit:   min over rounding, step sizes and biases of  E || f(x~) - y ||^2 + lambda R(V)

y is the float network's output of the unit, and x~ the unit's input as the quantized units before it make it, mixed element by
element with the float input (QDrop, arXiv 2203.05740). Some of the images are kept back: now and then the unit is hardened for
a moment and its loss on them taken, and the best such state is what stays, the start included. So a unit is never worse than
its start on images that it has not learned from, and learning ends where this loss has stopped falling.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from inc_clusterq.layout import images_of
from inc_clusterq.progress import Stage
from inc_clusterq.reconstruction.dropping import draw_mask
from inc_clusterq.reconstruction.fake_quantize import ActivationQuantizer, BiasCorrection, Mode, WeightQuantizer
from inc_clusterq.reconstruction.quantizers import in_mode, simulated
from inc_clusterq.reconstruction.rounding import beta_at, regulariser, soft_rounding
from inc_clusterq.reconstruction.settings import FEWEST_IMAGES, ReconstructionSettings
from inc_clusterq.reconstruction.sums import squared_error

logger = logging.getLogger(__name__)

FORWARD_BATCH = 64  # images per forward pass outside the optimisation
CHECKS = 20  # evenly over the steps
UNDECIDED = 0.001  # as long as more of the roundings are soft, the loss may still fall


@dataclass
class Flow:
    """What goes into the current unit and what should come out; (N, ...) each, and may be mapped."""

    float_inputs: Tensor
    quantized_inputs: Tensor
    targets: Tensor  # the float network's outputs of the unit
    weights: Tensor | None  # of the loss, shape of the targets; None: 1
    learned_from: Tensor  # numbers of the images
    judged_by: Tensor  # the same

    @property
    def keeps_back(self) -> bool:
        """Whether any image is judged by alone."""
        return self.judged_by is not self.learned_from


def reconstruction_loss(outputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """|| y - y' ||^2 summed over channels, mean over batch and space; shapes (N, C, ...)."""
    if weights is not None:
        return ((outputs - targets).square() * weights).sum(1).mean()
    return squared_error(outputs, targets) / (outputs.numel() / outputs.shape[1])


def power(targets: Tensor) -> Tensor:
    """The reconstruction loss of zero, || y ||^2 summed over channels, mean over batch and space."""
    return reconstruction_loss(torch.zeros_like(targets), targets)


def keep_back(count: int, share: float, seed: int, device: torch.device, views: int = 1) -> tuple[Tensor, Tensor]:
    """Numbers of the images to learn from, and to judge by: one tensor of all where the share is less than an image.

    With several views of each of `count` images, view v of image i is number v * count + i, and all views of an image are on
    the same side.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).to(device)
    kept = int(count * share)
    numbers = torch.stack([order + view * count for view in range(views)])
    if 0 < kept < count:
        return numbers[:, kept:].flatten(), numbers[:, :kept].flatten()
    return (everything := numbers.flatten()), everything


def optimise(
    module: fx.GraphModule,
    flow: Flow,
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
        harden(module, learned, learned=False)
    elif not len(learned):
        stage.skip(settings.iterations, label)
    else:
        best = _Best(module, learned, flow)
        with learning(module, learned, settings.drop_probability, generator), torch.enable_grad():
            _descend(module, learned, flow, settings, generator, stage, label, best)
        best.take()
    for part in learned:
        if isinstance(part, BiasCorrection):
            part.fix(part.shift.clone(), part.unit.clone())


class _Best:
    """The state of least loss on the images that judge, of those that were looked at; the first is the start."""

    def __init__(self, module: fx.GraphModule, learned: nn.ModuleList, flow: Flow) -> None:
        self._module, self._learned, self._flow = module, learned, flow
        self._state, self._loss = copied(learned), self._judged()
        self.looks_since = 0

    def look(self) -> None:
        """Harden for a moment, and take the loss on the images that judge."""
        soft = copied(self._learned)
        harden(self._module, self._learned, learned=True)
        loss = self._judged()
        self.looks_since += 1
        if loss < self._loss:
            self._state, self._loss, self.looks_since = copied(self._learned), loss, 0
        self._learned.load_state_dict(soft)

    def take(self) -> None:
        """Go back to the best state."""
        self._learned.load_state_dict(self._state)

    def _judged(self) -> float:
        flow = self._flow
        return loss_as_deployed(self._module, flow.quantized_inputs, flow.targets, flow.judged_by, flow.weights)


@torch.no_grad()
def loss_as_deployed(
    module: fx.GraphModule,
    inputs: Tensor,
    targets: Tensor,
    numbers: Tensor | None = None,
    weights: Tensor | None = None,
) -> float:
    """The reconstruction loss over all images, or those of `numbers`, everything hard."""
    numbers = torch.arange(len(inputs), device=inputs.device) if numbers is None else numbers
    total = 0.0
    with in_mode(module, Mode.HARD):
        for chosen in numbers.split(FORWARD_BATCH):
            loss = reconstruction_loss(module(taken(inputs, chosen)), taken(targets, chosen), _weights(weights, chosen))
            total += float(loss) * len(chosen)
    return total / len(numbers)


def copied(parts: nn.ModuleList) -> dict[str, Tensor]:
    """The state of simulated parts, to go back to."""
    return {name: tensor.clone() for name, tensor in parts.state_dict().items()}


def finite(parts: nn.ModuleList) -> bool:
    """Whether everything that was learned is a number; some operators have no gradient at some points, such as a root at 0."""
    return all(bool(tensor.isfinite().all()) for tensor in parts.parameters())


def harden(module: fx.GraphModule, parts: nn.ModuleList, *, learned: bool) -> None:
    """Fix what is deployed of `parts`; corrections last, since they follow the weights."""
    for part in parts:
        if isinstance(part, WeightQuantizer):
            part.harden(learned)
        elif isinstance(part, ActivationQuantizer):
            part.fix(*part.deployed())
    for node in module.graph.nodes:
        called = getattr(module, str(node.target), None) if node.op == "call_module" else None
        if isinstance(called, BiasCorrection) and called in set(parts):
            called.harden(getattr(module, str(node.args[1].target)).deployed())


def _descend(
    module: fx.GraphModule,
    learned: nn.ModuleList,
    flow: Flow,
    settings: ReconstructionSettings,
    generator: torch.Generator,
    stage: Stage,
    label: str,
    best: _Best,
) -> None:
    steps, images = settings.iterations, len(flow.learned_from)
    weights = [part for part in learned if isinstance(part, WeightQuantizer)]
    # The host leaves some operators' weights in float (transposed convolutions), and an optimiser wants a tensor.
    rounding = torch.optim.Adam([weight.v for weight in weights] or [torch.zeros(())], lr=settings.rounding_rate)
    stepping = step_optimiser(learned, settings.activation_learning_rate, settings.bias_learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(stepping, T_max=steps)
    look_every = max(1, steps // CHECKS)
    batch = min(images, images_per_step(flow.targets[0], settings))
    for step in range(steps):
        drawn = torch.randint(images, (batch,), generator=generator, device=generator.device)
        chosen = flow.learned_from[drawn]
        x = taken(flow.quantized_inputs, chosen)
        if settings.drop_probability:  # of x~, some elements are as in the float network (QDrop)
            x = x.lerp_(taken(flow.float_inputs, chosen), draw_mask(x, settings.drop_probability, generator))
        loss = reconstruction_loss(module(x), taken(flow.targets, chosen), _weights(flow.weights, chosen))
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
        if (step + 1) % look_every and step + 1 < steps:
            continue
        if not finite(learned):
            logger.warning("%s: gradients are not finite numbers, so it is left as the best state before was", label)
            stage.skip(steps - step // look_every * look_every, label)
            return
        if flow.keeps_back or step + 1 == steps:
            best.look()
        stage.advance(look_every if (step + 1) % look_every == 0 else steps % look_every, f"{label} loss {loss:.4g}")
        if step + 1 < steps and best.looks_since >= settings.patience and undecided(weights) < UNDECIDED:
            logger.debug("%s: flat after %d of %d steps", label, step + 1, steps)
            stage.skip(steps - step - 1, label)
            return


def step_optimiser(learned: nn.ModuleList, scale_rate: float, bias_rate: float) -> torch.optim.Adam:
    """Adam on everything that is learned but the rounding: step sizes and zero points, and biases."""
    scales: list[Tensor] = []
    biases: list[Tensor] = []
    for part in learned:
        if isinstance(part, BiasCorrection):
            biases.append(part.c)
        elif isinstance(part, ActivationQuantizer):
            scales += [part.scale_shift] if part.one_sided else [part.scale_shift, part.zero_point_shift]
        elif isinstance(part, WeightQuantizer) and part.joint:
            scales.append(part.scale_shift)
    groups: list[dict[str, Any]] = [{"params": scales, "lr": scale_rate}, {"params": biases, "lr": bias_rate}]
    nothing: list[dict[str, Any]] = [{"params": [torch.zeros(())]}]  # an optimiser wants a tensor
    return torch.optim.Adam([group for group in groups if group["params"]] or nothing)


def images_per_step(target: Tensor, settings: ReconstructionSettings) -> int:
    """As many images as have `step_positions` positions; `target` is the output for one of them, of shape (C, ...)."""
    positions = target[0].numel()
    return min(settings.batch_size, max(FEWEST_IMAGES, settings.step_positions // max(positions, 1)))


def undecided(weights: list[WeightQuantizer]) -> float:
    """Share of the weights whose h(V) is not within 0.05 of 0 or 1."""
    count = sum(weight.v.numel() for weight in weights)
    return sum(int(((soft_rounding(weight.v) - 0.5).abs() < 0.45).sum()) for weight in weights) / max(count, 1)


def _weights(weights: Tensor | None, chosen: Tensor) -> Tensor | None:
    return None if weights is None else taken(weights, chosen)


def taken(tensor: Tensor, chosen: Tensor) -> Tensor:
    """Images of a tensor that may be mapped, on the device of their numbers."""
    return images_of(tensor, chosen.to(tensor.device)).to(chosen.device)


@contextmanager
def learning(module: nn.Module, learned: nn.ModuleList, probability: float, generator: torch.Generator) -> Iterator[None]:
    """What is `learned` is soft, and its activation quantizers drop elements, with randomness from `generator`.

    The rest stays as it is; gradients pass through its activation quantizers, behind which something learned may stand.
    """
    all_activations = nn.ModuleList(part for part in simulated(module) if isinstance(part, ActivationQuantizer))
    activations = [part for part in learned if isinstance(part, ActivationQuantizer)]
    for activation in activations:
        activation.drop_probability, activation.generator = probability, generator
    try:
        with in_mode(module, Mode.HARD), in_mode(all_activations, Mode.STEPS), in_mode(learned, Mode.LEARN):
            yield
    finally:
        for activation in activations:
            activation.drop_probability, activation.generator = 0.0, None
