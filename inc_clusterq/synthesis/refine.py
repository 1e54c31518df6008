"""Direct optimisation of finished samples: the second phase, which the paper does not have.

A generator that is trained for minutes leaves the statistics of deep layers off. Optimising the samples themselves under
the same objective (as ZeroQ, arXiv 2001.00281, does from noise) closes that gap; the generator gives classes and a start.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inc_clusterq.inputs import InputSpec
from inc_clusterq.progress import Stage
from inc_clusterq.synthesis.augmentation import augment
from inc_clusterq.synthesis.batches import Batch
from inc_clusterq.synthesis.objective import evaluate
from inc_clusterq.synthesis.settings import ClusterQSettings
from inc_clusterq.synthesis.teacher import Teacher

START_DEVIATION = 0.25  # of the value range, of the noise that is refined where no generator ran


def random_samples(spec: InputSpec, samples: int, rng: torch.Generator) -> Tensor:
    """Noise around the middle of the value range, shape (samples, *spec.shape), normalised."""
    return from_unit(torch.randn(samples, *spec.shape, generator=rng) * START_DEVIATION + 0.5, spec)


def from_unit(unit: Tensor, spec: InputSpec) -> Tensor:
    """Shares of the value range, 0 to 1, as normalised inputs; exactly inside the range, whatever the rounding."""
    low, high = spec.bounds(unit)
    return torch.lerp(low, high, unit).clamp(low, high)


def to_unit(x: Tensor, spec: InputSpec) -> Tensor:
    """Inverse of `from_unit`."""
    low, high = spec.bounds(x)
    return ((x - low) / (high - low)).clamp(0, 1)


def refine(
    inputs: Tensor,  # (N, *spec.shape), normalised, inside the range
    batch: Batch,
    teacher: Teacher,
    spec: InputSpec,
    settings: ClusterQSettings,
    rng: torch.Generator,
    stage: Stage,
) -> Tensor:
    """The inputs of one batch after `refine_iterations` steps, same shape and range, where the teacher lies."""
    unit = to_unit(inputs.to(teacher.device), spec).requires_grad_()
    optimiser = torch.optim.Adam([unit], settings.refine_learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.refine_iterations)
    for _ in range(settings.refine_iterations):
        x = from_unit(unit, spec)
        seen = teacher.observe(augment(x, settings.augmentation, rng))
        losses = evaluate(x, seen, batch.labels, teacher, spec, settings, batch.centroids, batch.noise)
        optimiser.zero_grad()
        losses.total(settings).backward()
        optimiser.step()
        with torch.no_grad():
            unit.clamp_(0, 1)
        schedule.step()
        stage.advance(1, losses.note())
    return from_unit(unit.detach(), spec)
