"""The synthesizer `latent`: each batch by a generator of its own, optimised together with the batch's latents.

After Genie-D ("Genie: Show Me the Data for Quantization", CVPR 2023, arXiv 2212.04780), which takes a fresh generator G for
every batch and solves for its parameters and for the latents z at once, through a network with swing convolutions:

    min over G, z of L(G(z, y))        L as in `objective`

Here G is the class-conditional generator of ClusterQ (`generator`), smaller G and z being all that a batch needs; L has the
same terms and weights as there, so with `alignment_weight` above 0 the batches are aligned with the class centroids of those
before, and with 0 they are not. Unlike Genie there is the classification term, and the range of the sensor bounds the
values, in place of a penalty on each image's mean and deviation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inc_clusterq.inputs import InputSpec
from inc_clusterq.progress import Stage
from inc_clusterq.synthesis.augmentation import augment
from inc_clusterq.synthesis.batches import Batch
from inc_clusterq.synthesis.generator import build_generator
from inc_clusterq.synthesis.objective import Losses, evaluate
from inc_clusterq.synthesis.plateau import descend
from inc_clusterq.synthesis.settings import ClusterQSettings
from inc_clusterq.synthesis.swing import swinging
from inc_clusterq.synthesis.teacher import Teacher


def solve(
    batch: Batch, teacher: Teacher, spec: InputSpec, settings: ClusterQSettings, rng: torch.Generator, stage: Stage
) -> Tensor:
    """Samples (N, *spec.shape) after `refine_iterations` steps, normalised, inside the range, where the teacher lies."""
    samples = len(batch.labels)
    # The generator's BatchNorm takes the batch's own statistics and needs two rows; a single sample gets a twin.
    labels = batch.labels if samples > 1 else batch.labels.repeat(2)
    generator = build_generator(spec, teacher.embedded, settings.latent_size, rng, teacher.device)
    z = torch.randn(len(labels), settings.latent_size, generator=rng).to(teacher.device).requires_grad_()
    assert settings.learning_rate is not None
    groups: list[dict[str, Any]] = [
        {"params": list(generator.parameters()), "lr": settings.learning_rate},
        {"params": [z], "lr": settings.latent_learning_rate},
    ]
    optimiser = torch.optim.Adam(groups, betas=settings.betas)

    def evaluated() -> Losses:
        x = generator(z, labels)[:samples]
        with swinging(teacher.module, rng, wanted=settings.swing):
            seen = teacher.observe(augment(x, settings.augmentation, rng))
        return evaluate(x, seen, batch.labels, teacher, spec, settings, batch.centroids, batch.noise)

    descend(evaluated, optimiser, settings.refine_iterations, settings, stage)
    with torch.no_grad():
        solved: Tensor = generator(z, labels)[:samples]
    return solved
