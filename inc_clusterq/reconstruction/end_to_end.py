"""The last pass: step sizes and biases of the whole network learn together to give the float network's outputs.

Units are reconstructed one by one, and what each of them could not make up for adds up behind it. When all are done the
integers of the weights stay, and the few numbers that are left (a step size per channel and per activation, zero points,
biases) are learned end to end, as in EfficientQAT (E2E-QP, arXiv 2407.11062) but with the float network instead of labels:
    L = E || f(x) - y ||^2 + lambda E || y ||^2 mean over i of  E || h_i(x) - h'_i ||^2 / E || h'_i ||^2
with what comes to the activation quantizers, h_i, and in the float network, h'_i. A few hundred images tell little by their
outputs alone; what lies between keeps to the float network's course, as the hints of FitNets do (arXiv 1412.6550).

All calibration images are learned from, and what stays is where the steps end. Images to judge by would not be neutral here:
each of them had its part in how the units begin and in which of their states stayed. Their loss has been seen to rise while
that of images nobody had seen fell.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil

import torch
from torch import Tensor, fx, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from inc_clusterq.difference import drawn_in
from inc_clusterq.progress import Stage
from inc_clusterq.reconstruction.checkpoint import Chain
from inc_clusterq.reconstruction.fake_quantize import ActivationQuantizer, Mode
from inc_clusterq.reconstruction.from_outputs import with_gradients_from_outputs
from inc_clusterq.reconstruction.learning import (
    CHECKS,
    copied,
    finite,
    harden,
    loss_as_deployed,
    power,
    reconstruction_loss,
    step_optimiser,
    taken,
)
from inc_clusterq.reconstruction.quantizers import in_mode, simulated
from inc_clusterq.reconstruction.settings import FEWEST_IMAGES, ReconstructionSettings
from inc_clusterq.reconstruction.sums import inner, squared_error
from inc_clusterq.resuming import SAVE_SECONDS, State, adam_state, below, restore_adam

logger = logging.getLogger(__name__)

BATCH = 16  # images per step. By trial
VALUES_AT_ONCE = 2**25  # that come to activation quantizers; a step keeps about six for each, 0.8 GB in all
DIVERGED = 2.0  # times the loss at the start; some growth is no harm, see above


def learn_end_to_end(
    module: fx.GraphModule,  # the network, its units reconstructed
    inputs: Tensor,  # shape: (N, *shape)
    targets: Tensor,  # the float network's outputs, shape: (N, C, ...)
    settings: ReconstructionSettings,
    steps: int,
    before: float,  # loss over all images
    chain: Chain,  # whose last link this pass is
    stage: Stage,
) -> float:
    """Learn the step sizes and biases of the whole network, and leave them hard; returns the loss over all images.

    From time to time the state is kept in `chain`, and one that is found there is where the pass goes on.
    """
    parts = nn.ModuleList(simulated(module))
    start = copied(parts)
    with in_mode(module, Mode.STEPS), torch.enable_grad():
        _descend(with_gradients_from_outputs(module), parts, inputs, settings, steps, chain, stage)
    after = float("nan")
    if finite(parts):
        harden(module, parts, learned=False)
        after = loss_as_deployed(module, inputs, targets)
    if after <= DIVERGED * before:
        return after
    logger.warning("end to end the loss has gone from %.4g to %.4g; what the units have left stays", before, after)
    parts.load_state_dict(start)
    return before


def _descend(
    module: fx.GraphModule,
    parts: nn.ModuleList,
    inputs: Tensor,
    settings: ReconstructionSettings,
    steps: int,
    chain: Chain,
    stage: Stage,
) -> None:
    rate = settings.end_to_end_learning_rate
    optimiser = step_optimiser(parts, rate, rate)
    schedule = CosineAnnealingLR(optimiser, T_max=steps)
    generator = chain.generator(inputs.device)
    told = done = 0
    if (state := chain.found_state()) is not None:
        told = done = _restore(state, parts, optimiser, schedule, generator)
        stage.skip(done, "from disk")
    saved = time.monotonic()
    look_every = max(1, steps // CHECKS)
    together = images_at_once(module, inputs, settings)
    for step in range(done, steps):
        drawn = torch.randint(len(inputs), (BATCH,), generator=generator, device=generator.device)
        images = taken(inputs, drawn)
        optimiser.zero_grad(set_to_none=True)
        total = 0.0
        for some in images.split(together):
            loss = end_to_end_loss(module, some, settings.end_to_end_features) * (len(some) / BATCH)
            loss.backward()
            total += float(loss.detach())
        optimiser.step()
        schedule.step()
        if (step + 1) % look_every == 0 or step + 1 == steps:
            if not finite(parts):
                stage.skip(steps - told)
                return
            stage.advance(step + 1 - told, f"loss {total:.4g}")
            told = step + 1
        if time.monotonic() - saved >= SAVE_SECONDS:
            chain.keep_state(_state(parts, optimiser, schedule, generator))
            saved = time.monotonic()


@torch.no_grad()
def images_at_once(module: fx.GraphModule, inputs: Tensor, settings: ReconstructionSettings) -> int:
    """How many images of a step go through the network together: few where maps are large, which bounds the memory.

    `batch_size` at most, and in groups of one size as far as possible.
    """
    with in_mode(module, Mode.FLOAT), _hidden(module) as hidden:
        module(inputs[:1])
    allowed = max(FEWEST_IMAGES, VALUES_AT_ONCE // max(1, sum(maps.numel() for maps in hidden)))
    return ceil(BATCH / ceil(BATCH / min(BATCH, settings.batch_size, allowed)))


def end_to_end_loss(module: fx.GraphModule, images: Tensor, features: float) -> Tensor:
    """L of the network as it is, against the one in float; `features` is lambda."""
    with torch.no_grad(), in_mode(module, Mode.FLOAT), _hidden(module) as exact:
        y = module(images)
    with _hidden(module) as hidden:
        loss = reconstruction_loss(module(images), y)
    learned = [(h, e) for h, e in zip(hidden, exact, strict=True) if h.requires_grad]  # the network's input is not
    if not features or not learned:
        return loss
    return loss + features * power(drawn_in(y)) * torch.stack([relative_error(h, e) for h, e in learned]).mean()


@contextmanager
def _hidden(module: fx.GraphModule) -> Iterator[list[Tensor]]:
    """What comes to the activation quantizers, in the order in which it comes."""
    seen: list[Tensor] = []
    activations = [part for part in module.modules() if isinstance(part, ActivationQuantizer)]
    hooks = [part.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for part in activations]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def relative_error(found: Tensor, exact: Tensor) -> Tensor:
    """Squared error in units of the exact power; of a quarter of the power found where that is more.

    So what is all but dead in the float network, and not in the quantized one, does not drown the rest.
    """
    with torch.no_grad():
        by = torch.maximum(inner(exact, exact), inner(found, found) / 4)
    return squared_error(found, exact) / by if by else found.new_zeros(())


def _state(parts: nn.ModuleList, optimiser: Adam, schedule: CosineAnnealingLR, generator: torch.Generator) -> State:
    """Everything that the next steps depend on."""
    rates = torch.tensor([group["lr"] for group in optimiser.param_groups], dtype=torch.float64)
    counts = {"done": torch.tensor(schedule.last_epoch), "rates": rates, "rng": generator.get_state()}
    return {**{f"parts.{name}": value for name, value in parts.state_dict().items()}, **adam_state(optimiser), **counts}


def _restore(
    state: State, parts: nn.ModuleList, optimiser: Adam, schedule: CosineAnnealingLR, generator: torch.Generator
) -> int:
    """Inverse of `_state`; returns the steps done."""
    parts.load_state_dict(below("parts", state))
    restore_adam(state, optimiser)
    for group, rate in zip(optimiser.param_groups, state["rates"].tolist(), strict=True):
        group["lr"] = rate
    generator.set_state(state["rng"])
    schedule.last_epoch = int(state["done"])
    return schedule.last_epoch
