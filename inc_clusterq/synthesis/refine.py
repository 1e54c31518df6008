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
from inc_clusterq.synthesis.objective import Losses, evaluate
from inc_clusterq.synthesis.plateau import descend
from inc_clusterq.synthesis.resolution import enlarge
from inc_clusterq.synthesis.settings import ClusterQSettings
from inc_clusterq.synthesis.spectrum import Pixels, Waves
from inc_clusterq.synthesis.teacher import Teacher

START_DEVIATION = 0.25  # of the value range, of the noise that is refined where no generator ran


def random_samples(spec: InputSpec, samples: int, rng: torch.Generator) -> Tensor:
    """Noise around the middle of the value range, shape (samples, *spec.shape), normalised."""
    return from_unit(torch.randn(samples, *spec.shape, generator=rng, dtype=torch.float32) * START_DEVIATION + 0.5, spec)


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
        x = _descend(x, settings.coarse_iterations, batch, teacher, coarse, settings, rng, stage)
        x = enlarge(x, spec)
    return _descend(x, steps, batch, teacher, spec, settings, rng, stage)


def _descend(
    inputs: Tensor,
    steps: int,
    batch: Batch,
    teacher: Teacher,
    spec: InputSpec,  # of these inputs
    settings: ClusterQSettings,
    rng: torch.Generator,
    stage: Stage,
) -> Tensor:
    start = to_unit(inputs, spec)
    low, high = spec.bounds(start)
    smoothness, rate = settings.refine_smoothness, settings.refine_learning_rate
    assert rate is not None
    image = Waves(start, smoothness) if smoothness else Pixels(start)

    def evaluated() -> Losses:
        x = torch.addcmul(low, high - low, image.unit())  # `from_unit` without its clamp, which costs two passes over an image
        seen = teacher.observe(augment(x, settings.augmentation, rng))
        return evaluate(x, seen, batch.labels, teacher, spec, settings, batch.centroids, batch.noise)

    descend(evaluated, torch.optim.Adam([image.parameter], rate), steps, settings, stage, after=image.bound)
    with torch.no_grad():
        return from_unit(image.unit(), spec)
