"""ClusterQ (arXiv 2205.00179): a calibration set from a trained network alone.

1. A class-conditional generator learns inputs that the network classifies as wanted and whose BatchNorm statistics are
   those of the training data; after a warm-up their class features are drawn to per-class centroids (`centroids`).
2. It paints the set, every class equally often, and the samples themselves are optimised further (`refine`).

Images for a network that was trained on photographs, as far as it can tell (`start`), begin at dead leaves (`leaves`) in place
of what a generator paints, and 1. is left out: docs/synthesis.md tells why, and `benchmarks/synthesis.py` compares (sources
`generator`, `leaves`, `clusterq-waves`).

With `synthesizer: latent` each batch is made by a generator of its own instead (`latent`).

One `torch.Generator`, on the CPU, gives every random number, so a seed names one result: to the bit on the same kind of
machine, as far as the network's own operations are deterministic there. A `Draft` that is kept on disk lets a process
that was killed go on from the last state of the training, or the last finished batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from inc_clusterq.allocation import freed_memory_kept
from inc_clusterq.determinism import repeatable
from inc_clusterq.inputs import InputSpec
from inc_clusterq.placement import copied_to_gpu, within_gpu_memory
from inc_clusterq.precision import float32_by_default
from inc_clusterq.progress import NO_STAGE, SILENT, Progress, Stage
from inc_clusterq.synthesis.acceleration import compiled, is_channels_last, is_compiled, is_in_bfloat16
from inc_clusterq.synthesis.augmentation import augment
from inc_clusterq.synthesis.batches import Batch, batch_count, make_batches
from inc_clusterq.synthesis.centroids import Centroids, moved, unseen
from inc_clusterq.synthesis.draft import Draft
from inc_clusterq.synthesis.generator import Generator, build_generator
from inc_clusterq.synthesis.latent import solve
from inc_clusterq.synthesis.objective import draw_diversity, evaluate
from inc_clusterq.synthesis.refine import random_samples, refine
from inc_clusterq.synthesis.resolution import half_size
from inc_clusterq.synthesis.settings import ClusterQSettings
from inc_clusterq.synthesis.start import begins_with_leaves, leaf_samples
from inc_clusterq.synthesis.statistics import Moments
from inc_clusterq.synthesis.teacher import Teacher, teach
from inc_clusterq.synthesis.training_state import restore_training, training_state

TRAINING = "training"  # stage of a draft


def synthesise(
    module: nn.Module,
    spec: InputSpec,
    settings: ClusterQSettings,
    *,
    num_classes: int,
    samples: int,
    seed: int,
    progress: Progress = SILENT,
) -> tuple[Tensor, Tensor]:
    """Inputs (samples, *spec.shape), float32, normalised, inside the value range; and their labels (samples,), int64.

    Both lie on the CPU. The work is done on a copy of `module` on the GPU where there is one, else where `module` lies, which
    is then in use meanwhile and comes back unchanged. Any stretch of the labels is balanced to within one or two per class.
    `num_classes` is 0 for a model that does not return class logits: the BatchNorm statistics alone are matched, and every
    label is -1.
    """
    draft = Draft()
    synthesise_into(draft, module, spec, settings, num_classes=num_classes, samples=samples, seed=seed, progress=progress)
    inputs, labels = zip(*draft.shards, strict=True)
    return torch.cat(inputs), torch.cat(labels)


@within_gpu_memory()
@float32_by_default()
@torch.inference_mode(mode=False)  # a lazy loader may be read first inside somebody's, or inside `no_grad`
def synthesise_into(
    draft: Draft,
    module: nn.Module,
    spec: InputSpec,
    settings: ClusterQSettings,
    *,
    num_classes: int,
    samples: int,
    seed: int,
    progress: Progress = SILENT,
) -> ClusterQSettings:
    """Fill `draft` with what `synthesise` returns, from wherever it stands; the outcome is the same to the bit.

    Returns the settings with everything that they leave to inputs, network and machine as it was decided.
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}; it must be at least 1")
    if num_classes == 1 or num_classes < 0:
        raise ValueError(f"num_classes is {num_classes}; a classifier has at least 2, and 0 means no classes")
    settings = settings.of_inputs(spec.shape)
    rng = torch.Generator().manual_seed(seed)
    labels = balanced_labels(torch.arange(max(num_classes, 1)), samples, rng)
    network = copied_to_gpu(module, spec.middle(2), "images are synthesised")
    with (
        torch.enable_grad(),
        repeatable(),
        freed_memory_kept(),
        teach(network, spec, num_classes=num_classes, first_aligned_layer=settings.first_aligned_layer) as taught,
    ):
        teacher = replace(taught, bfloat16=is_in_bfloat16(settings, spec, taught))
        teacher = replace(teacher, channels_last=is_channels_last(spec, teacher))
        batches, steps = batch_count(samples, settings.refine_batch), settings.refine_iterations
        decided: dict[str, Any] = {"first_aligned_layer": teacher.first_aligned, "bfloat16": teacher.bfloat16}
        if settings.synthesizer == "latent":
            title = "Optimising latents"

            def optimise(batch: Batch, stage: Stage) -> Tensor:
                return solve(batch, teacher, spec, settings, rng, stage)
        else:
            coarse = half_size(teacher, spec) if settings.coarse_iterations else None
            leaves = begins_with_leaves(settings, spec, teacher)
            decided |= {"start": "leaves" if leaves else "generator", "coarse_share": settings.coarse_share if coarse else 0.0}
            if leaves:
                title, start = "Refining dead leaves", leaf_samples(coarse or spec, rng)
            else:
                title = "Refining synthetic inputs"
                start = start_samples(labels, teacher, coarse or spec, settings, rng, draft, progress)

            def optimise(batch: Batch, stage: Stage) -> Tensor:
                inputs = start(batch.rows)
                return refine(inputs, batch, fastest, spec, coarse, settings, rng, stage) if steps else inputs

        with ExitStack() as stack:
            fastest = teacher
            if steps and is_compiled(settings, spec, batches, teacher.device):
                with progress.stage("Compiling the model", 1) as stage:
                    fastest = stack.enter_context(compiled(teacher, spec, math.ceil(samples / batches)))
                    stage.advance(1)
            decided["compile_teacher"] = fastest is not teacher
            with progress.stage(title, batches * steps) if steps else nullcontext(NO_STAGE) as stage:
                make_batches(labels, batches, steps, teacher, settings, rng, draft, stage, optimise)
    return settings.model_copy(update=decided)


def start_samples(
    labels: Tensor,
    teacher: Teacher,
    spec: InputSpec,
    settings: ClusterQSettings,
    rng: torch.Generator,
    draft: Draft,
    progress: Progress,
) -> Callable[[slice], Tensor]:
    """What is refined, some rows at a time: painted by a generator that is trained first, or noise."""
    if not settings.iterations:
        noise = random_samples(spec, len(labels), rng)
        return lambda rows: noise[rows]
    classes = labels.unique().to(teacher.device)
    generator = build_generator(spec, teacher.embedded, settings.latent_size, rng, teacher.device)
    train(generator, teacher, spec, settings, classes, rng, progress, draft)
    latents = torch.cat([_latents(len(part), settings, rng, teacher.device) for part in labels.split(settings.batch_size)])
    return lambda rows: paint(generator, latents[rows], labels[rows].to(teacher.device), settings.batch_size)


def balanced_labels(classes: Tensor, samples: int, rng: torch.Generator) -> Tensor:
    """`samples` labels, shape (samples,): rounds over all `classes`, each in a new random order, the last one cut."""
    rounds = math.ceil(samples / len(classes))
    order = torch.cat([torch.randperm(len(classes), generator=rng) for _ in range(rounds)])[:samples]
    return classes[order.to(classes.device)]


def train(
    generator: Generator,
    teacher: Teacher,
    spec: InputSpec,
    settings: ClusterQSettings,
    classes: Tensor,
    rng: torch.Generator,
    progress: Progress,
    draft: Draft,
) -> Centroids:
    """Train `generator` in place for `iterations` steps on `classes`; return the class centroids it arrived at."""
    first = teacher.first_aligned
    centroids = unseen(classes, teacher.references[first:])
    assert settings.learning_rate is not None
    optimiser = torch.optim.Adam(generator.parameters(), settings.learning_rate, betas=settings.betas)
    noise: tuple[Moments, ...] = ()
    done = 0
    if (state := draft.find(TRAINING)) is not None:
        centroids, done = restore_training(state, generator, optimiser, centroids, rng)
    with progress.stage("Training the generator", settings.iterations) as stage:
        if done:
            stage.skip(done, "resumed")
        for iteration in range(done, settings.iterations):
            if iteration == settings.warmup_iterations and teacher.classifies:
                centroids = start_centroids(generator, teacher, settings, centroids, rng)
            warm = iteration >= settings.warmup_iterations and teacher.classifies
            if warm:
                noise = draw_diversity(
                    rng,
                    teacher.references[first:],
                    len(centroids.classes),
                    settings.mean_diversity,
                    settings.variance_diversity,
                )
            labels = balanced_labels(centroids.classes, settings.batch_size, rng)
            x = generator(_latents(settings.batch_size, settings, rng, teacher.device), labels)
            seen = teacher.observe(augment(x, settings.augmentation, rng))
            losses = evaluate(x, seen, labels, teacher, spec, settings, centroids if warm else None, noise)
            optimiser.zero_grad()
            losses.total(settings).backward()
            optimiser.step()
            if warm:
                centroids = moved(centroids, seen.samples[first:], labels, seen.predicted, settings.centroid_momentum)
            stage.advance(1, losses.note())
            if draft.due or iteration + 1 == settings.iterations:
                draft.keep(TRAINING, training_state(generator, optimiser, centroids, iteration + 1, rng))
    return centroids


@torch.no_grad()
def start_centroids(
    generator: Generator, teacher: Teacher, settings: ClusterQSettings, centroids: Centroids, rng: torch.Generator
) -> Centroids:
    """Centroids from `centroid_samples` generated samples of each class."""
    labels = centroids.classes.repeat_interleave(settings.centroid_samples)
    aligned, predicted = [], []
    for part in labels.split(settings.batch_size):
        z = _latents(len(part), settings, rng, teacher.device)
        seen = teacher.observe(paint(generator, z, part, settings.batch_size))
        aligned.append(seen.samples[teacher.first_aligned :])  # and no more: 1,000 classes have thousands of samples
        predicted.append(seen.predicted)
    samples = [Moments.joined(layer) for layer in zip(*aligned, strict=True)]
    return moved(centroids, samples, labels, torch.cat(predicted), settings.centroid_momentum)


@torch.no_grad()
def paint(generator: Generator, latents: Tensor, labels: Tensor, most: int) -> Tensor:
    """One generated sample per latent, shape (N, *spec.shape), at `most` at once."""
    # Running statistics instead of the batch's own: a sample must not depend on its neighbours, nor a last one fail alone.
    generator.eval()
    x = torch.cat([generator(z, y) for z, y in zip(latents.split(most), labels.split(most), strict=True)])
    generator.train()
    return x


def _latents(samples: int, settings: ClusterQSettings, rng: torch.Generator, device: torch.device) -> Tensor:
    return torch.randn(samples, settings.latent_size, generator=rng).to(device)
