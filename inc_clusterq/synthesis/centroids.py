"""Per-class feature centroids C_{l,c} and their moving average (ClusterQ, arXiv 2205.00179, section 3.2).

    start:   C = m_c of class-conditional synthetic samples, once the generator has warmed up
    then:    C <- (1 - d) C + d m_c    with d = `centroid_momentum`

m_c are the moments of class c at the input of BatchNorm layer l, taken only over samples that the teacher assigns to c.
A class of which no such sample was met yet is not `seen`, and starts from the first batch that holds one. (The released
code starts every class from the running statistics of the whole training set, so that its classes cannot differ.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inc_clusterq.synthesis.statistics import Moments, Reference, class_moments


@dataclass(frozen=True)
class Centroids:
    """Moments per class and aligned layer; row i belongs to class `classes[i]`."""

    classes: Tensor  # (K,) int64, ascending
    layers: tuple[Moments, ...]  # each (K, C)
    seen: Tensor  # (K,) bool

    def rows(self, labels: Tensor) -> Tensor:
        """Row of each label, shape like `labels`; every label must be one of `classes`."""
        return torch.searchsorted(self.classes, labels)


def unseen(classes: Tensor, references: Sequence[Reference]) -> Centroids:
    """Centroids of which none has been seen; `references` are the aligned layers."""
    empty = tuple(
        Moments(*(layer.moments.mean.new_zeros(len(classes), len(layer.moments.mean)) for _ in range(2)))
        for layer in references
    )
    return Centroids(classes, empty, torch.zeros_like(classes, dtype=torch.bool))


def moved(
    centroids: Centroids,
    samples: Sequence[Moments],  # aligned layers, each (N, C)
    labels: Tensor,  # (N,), the wanted classes
    predicted: Tensor,  # (N,), what the teacher says
    momentum: float,
) -> Centroids:
    """The centroids after one batch: moved by d towards its classes, or started where a class was not seen before."""
    rows, right = centroids.rows(labels), predicted == labels
    total = len(centroids.classes)
    counts = torch.zeros_like(centroids.classes).index_add(0, rows, right.to(torch.int64))
    met = counts > 0
    step = torch.where(centroids.seen, momentum, 1.0) * met  # (K,): d, 1 for a start, 0 for a class not met
    layers = []
    for layer, batch in zip(centroids.layers, samples, strict=True):
        found, _ = class_moments(batch.detach(), rows, total, right)
        d = step.to(found.mean.dtype).unsqueeze(1)
        layers.append(Moments(torch.lerp(layer.mean, found.mean, d), torch.lerp(layer.variance, found.variance, d)))
    return Centroids(centroids.classes, tuple(layers), centroids.seen | met)
