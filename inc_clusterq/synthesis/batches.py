"""Inputs made batch by batch, each batch one shard; class centroids go from one batch to the next.

The centroids start from the first batch, and each finished batch moves them: optimised samples, not a generator's, say where
a class lies. Within a batch the centroids and their noise stand still, so that the optimiser has a fixed goal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from inc_clusterq.errors import ModelError
from inc_clusterq.progress import Stage
from inc_clusterq.resuming import State
from inc_clusterq.synthesis.centroids import Centroids, moved, unseen
from inc_clusterq.synthesis.draft import Draft
from inc_clusterq.synthesis.objective import draw_diversity
from inc_clusterq.synthesis.settings import ClusterQSettings
from inc_clusterq.synthesis.statistics import Moments
from inc_clusterq.synthesis.teacher import Teacher

STAGE = "batches"


@dataclass(frozen=True)
class Batch:
    """What one batch is to become."""

    rows: slice  # of the whole set
    labels: Tensor  # (N,), on the teacher's device
    centroids: Centroids
    noise: tuple[Moments, ...]


Optimise = Callable[[Batch, Stage], Tensor]  # samples (N, *shape), normalised, inside the range; advances the stage


def batch_count(samples: int, largest: int) -> int:
    """Batches of nearly equal size: the statistics of a short last one could hardly be those of a data set."""
    return math.ceil(samples / largest)


def make_batches(
    labels: Tensor,  # (samples,), on the CPU
    batches: int,
    steps: int,
    teacher: Teacher,
    settings: ClusterQSettings,
    rng: torch.Generator,
    draft: Draft,
    stage: Stage,
    optimise: Optimise,
) -> None:
    """Add every batch that `draft` has not yet, in order; `steps` are those of one batch."""
    aligned = teacher.references[teacher.first_aligned :]
    centroids = unseen(labels.unique().to(teacher.device), aligned)
    state = draft.find(STAGE)
    if state is not None:
        centroids = centroids_of(state, centroids)
        rng.set_state(state["rng"])
    if draft.shards:
        stage.skip(steps * len(draft.shards), "resumed")
    start = 0
    for number, wanted in enumerate(labels.tensor_split(batches)):
        rows = slice(start, start + len(wanted))
        start = rows.stop
        if number < len(draft.shards):
            continue
        on_device = wanted.to(teacher.device)
        noise = draw_diversity(rng, aligned, len(centroids.classes), settings.mean_diversity, settings.variance_diversity)
        x = optimise(Batch(rows, on_device, centroids, noise), stage)
        if not bool(x.isfinite().all()):
            raise ModelError(
                "the synthesis has not ended at finite numbers: the gradients of the model, or BatchNorm statistics of it, are "
                "not finite; nothing is saved of this batch"
            )
        if teacher.classifies:
            with torch.no_grad():
                seen = teacher.observe(x)
            features = seen.samples[teacher.first_aligned :]
            centroids = moved(centroids, features, on_device, seen.predicted, settings.centroid_momentum)
        shown = wanted if teacher.classifies else torch.full_like(wanted, -1)
        draft.add(x.cpu(), shown, STAGE, {**centroids_state(centroids), "rng": rng.get_state()})


def centroids_state(centroids: Centroids) -> State:
    """The centroids as named tensors."""
    state = {"centroids.seen": centroids.seen}
    for number, layer in enumerate(centroids.layers):
        state |= {f"centroids.{number}.mean": layer.mean, f"centroids.{number}.variance": layer.variance}
    return state


def centroids_of(state: State, like: Centroids) -> Centroids:
    """Inverse of `centroids_state`, on the device of `like`."""
    layers = tuple(
        Moments(state[f"centroids.{number}.mean"].to(layer.mean), state[f"centroids.{number}.variance"].to(layer.variance))
        for number, layer in enumerate(like.layers)
    )
    return Centroids(like.classes, layers, state["centroids.seen"].to(like.seen))
