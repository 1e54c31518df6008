"""Direct optimisation of finished samples: the second phase, which the paper does not have.

A generator that is trained for minutes leaves the statistics of deep layers off. Optimising the samples themselves under
the same objective (as ZeroQ, arXiv 2001.00281, does from noise) closes that gap; the generator gives classes and a start.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inc_clusterq.inputs import InputSpec, is_large
from inc_clusterq.progress import Stage
from inc_clusterq.synthesis.augmentation import augment
from inc_clusterq.synthesis.batches import Batch
from inc_clusterq.synthesis.objective import Losses, evaluate
from inc_clusterq.synthesis.plateau import descend
from inc_clusterq.synthesis.resolution import enlarge
from inc_clusterq.synthesis.settings import ClusterQSettings
from inc_clusterq.synthesis.spectrum import Pixels, Waves
from inc_clusterq.synthesis.teacher import Teacher

# By trial: at 224 pixels a higher rate drives the statistics away before it brings them back.
SMALL_RATE, LARGE_RATE = 0.03, 0.01
LARGE_SMOOTHNESS = 1.0
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
    inputs: Tensor,  # (N, *shape) of `coarse` where that is given, else of `spec`; normalised, inside the range
    batch: Batch,
    teacher: Teacher,
    spec: InputSpec,
    coarse: InputSpec | None,
    settings: ClusterQSettings,
    rng: torch.Generator,
    stage: Stage,
) -> Tensor:
    """The inputs of one batch after `refine_iterations` steps, (N, *spec.shape), inside the range, where the teacher lies.

    With `coarse` the first `coarse_iterations` of them are made at its size.
    """
    x, steps = inputs.to(teacher.device), settings.refine_iterations
    if coarse is not None:
        steps -= settings.coarse_iterations
        x = _descend(x, settings.coarse_iterations, batch, teacher, coarse, spec, settings, rng, stage)
        x = enlarge(x, spec)
    return _descend(x, steps, batch, teacher, spec, spec, settings, rng, stage)


def _descend(
    inputs: Tensor,
    steps: int,
    batch: Batch,
    teacher: Teacher,
    spec: InputSpec,  # of these inputs
    full: InputSpec,  # of the finished ones
    settings: ClusterQSettings,
    rng: torch.Generator,
    stage: Stage,
) -> Tensor:
    start = to_unit(inputs, spec)
    low, high = spec.bounds(start)
    smoothness = _smoothness(settings, full)
    image = Waves(start, smoothness) if smoothness else Pixels(start)
    rate = settings.refine_learning_rate
    if rate is None:
        rate = LARGE_RATE if is_large(full.shape) else SMALL_RATE

    def evaluated() -> Losses:
        x = torch.addcmul(low, high - low, image.unit())  # `from_unit` without its clamp, which costs two passes over an image
        seen = teacher.observe(augment(x, settings.augmentation, rng))
        return evaluate(x, seen, batch.labels, teacher, spec, settings, batch.centroids, batch.noise)

    descend(evaluated, torch.optim.Adam([image.parameter], rate), steps, settings, stage, after=image.bound)
    with torch.no_grad():
        return from_unit(image.unit(), spec)


def _smoothness(settings: ClusterQSettings, spec: InputSpec) -> float:
    """The power by which the steps of waves fall with frequency, 0 for pixels and for what has no neighbours."""
    if len(spec.shape) < 2:
        return 0.0
    wanted = settings.refine_smoothness
    return wanted if wanted is not None else LARGE_SMOOTHNESS if is_large(spec.shape) else 0.0
