"""Direct optimisation of finished samples: the second phase, which the paper does not have.

A generator that is trained for minutes leaves the statistics of deep layers off. Optimising the samples themselves under
the same objective (as ZeroQ, arXiv 2001.00281, does from noise) closes that gap; the generator gives classes and a start.

The class centroids start anew here, from the first batch, and each finished batch moves them: those of refined samples are
closer to real ones than the generator's (measured on ResNet-20, last layer, cosine about the mean of all classes: 0.92
against 0.80). Within a batch the centroids and their noise stand still, so that the optimiser has a fixed goal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from inc_clusterq.inputs import InputSpec
from inc_clusterq.progress import Progress
from inc_clusterq.synthesis.augmentation import augment
from inc_clusterq.synthesis.centroids import Centroids, moved, unseen
from inc_clusterq.synthesis.objective import draw_diversity, evaluate
from inc_clusterq.synthesis.settings import ClusterQSettings
from inc_clusterq.synthesis.statistics import Moments
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
    labels: Tensor,  # (N,)
    teacher: Teacher,
    spec: InputSpec,
    settings: ClusterQSettings,
    rng: torch.Generator,
    progress: Progress,
) -> Tensor:
    """The inputs after `refine_iterations` steps per batch, same shape and range, on the CPU."""
    # Batches of nearly equal size: the statistics of a short last one could hardly be those of a data set.
    batches = math.ceil(len(inputs) / settings.refine_batch)
    aligned = teacher.references[teacher.first_aligned :]
    centroids = unseen(labels.unique().to(teacher.device), aligned)
    refined = []
    with progress.stage("Refining synthetic inputs", batches * settings.refine_iterations) as stage:
        for batch, wanted in zip(inputs.tensor_split(batches), labels.tensor_split(batches), strict=True):
            wanted = wanted.to(teacher.device)
            noise = draw_diversity(rng, aligned, len(centroids.classes), settings.mean_diversity, settings.variance_diversity)
            unit = to_unit(batch.to(teacher.device), spec).requires_grad_()
            optimiser = torch.optim.Adam([unit], settings.refine_learning_rate)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.refine_iterations)
            for _ in range(settings.refine_iterations):
                note = _step(unit, wanted, teacher, spec, settings, centroids, noise, rng, optimiser)
                schedule.step()
                stage.advance(1, note)
            x = from_unit(unit.detach(), spec)
            with torch.no_grad():
                seen = teacher.observe(x)
            features = seen.samples[teacher.first_aligned :]
            centroids = moved(centroids, features, wanted, seen.predicted, settings.centroid_momentum)
            refined.append(x.cpu())
    return torch.cat(refined)


def _step(
    unit: Tensor,
    labels: Tensor,
    teacher: Teacher,
    spec: InputSpec,
    settings: ClusterQSettings,
    centroids: Centroids,
    noise: Sequence[Moments],
    rng: torch.Generator,
    optimiser: torch.optim.Optimizer,
) -> str:
    x = from_unit(unit, spec)
    seen = teacher.observe(augment(x, settings.augmentation, rng))
    losses = evaluate(x, seen, labels, teacher, spec, settings, centroids, noise)
    optimiser.zero_grad()
    losses.total(settings).backward()
    optimiser.step()
    with torch.no_grad():
        unit.clamp_(0, 1)
    return losses.note()
