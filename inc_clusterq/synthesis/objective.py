"""The terms that make an input worth calibrating with (ClusterQ, arXiv 2205.00179, section 3), as pure functions.

    L = w_c L_CE + w_s L_BNS + w_a L_SFDA + w_p L_TV

With D_l(m, t) the distance between two sets of channel moments at BatchNorm layer l (`distance`):

    L_CE   = CE(T(x), y)                                                            classification
    L_BNS  = 1/L sum_l D_l(moments of the batch, running statistics of l)           statistics
    L_SFDA = mean over classes c of the batch, mean over l >= l0 of
             D_l(moments of class c, centroid of c at l + noise)                    alignment
    L_TV   = mean |difference of neighbours| / value range (`variation`)            prior (not in the paper)

The paper sums L_SFDA over classes and layers; the means keep one weight right for ten classes and for a thousand. In the
released code only the deepest layer counts and every class has the same centroid; here each layer and class has its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from inc_clusterq.inputs import InputSpec
from inc_clusterq.synthesis.centroids import Centroids
from inc_clusterq.synthesis.settings import ClusterQSettings, Distance
from inc_clusterq.synthesis.statistics import Moments, Reference, batch_moments, class_moments
from inc_clusterq.synthesis.teacher import Observation, Teacher
from inc_clusterq.synthesis.variation import total_variation


def distance(moments: Moments, target: Moments, layer: Reference, kind: Distance) -> Tensor:
    """D_l, the mean over the channels, shape (...) for moments of shape (..., C).

    variance:   (m - t_m)^2 + (v - t_v)^2                                (the paper)
    deviation:  (m - t_m)^2 + (sqrt(v + eps) - sqrt(t_v + eps))^2
    relative:   the line above divided by the mean of the layer's running sigma^2 + eps
    """
    mean_error = (moments.mean - target.mean).square()
    if kind == "variance":
        return (mean_error + (moments.variance - target.variance).square()).mean(-1)
    # eps also keeps the slope of the root finite where a channel is constant.
    deviation, wanted = ((m.variance.clamp(min=0) + layer.eps).sqrt() for m in (moments, target))
    error = (mean_error + (deviation - wanted).square()).mean(-1)
    return error / (layer.moments.variance + layer.eps).mean() if kind == "relative" else error


def classification(logits: Tensor, labels: Tensor) -> Tensor:
    """L_CE, the mean cross-entropy of `logits` (N, K) with `labels` (N,)."""
    return nn.functional.cross_entropy(logits, labels)


def statistics(samples: Sequence[Moments], references: Sequence[Reference], kind: Distance) -> Tensor:
    """L_BNS from the moments of each sample, (N, C) per layer."""
    return torch.stack(
        [distance(batch_moments(s), r.moments, r, kind) for s, r in zip(samples, references, strict=True)]
    ).mean()


@torch.no_grad()
def distance_of(
    inputs: Tensor,  # shape: (N, *shape), normalised
    teacher: Teacher,
    most: int,  # that the network sees at once
) -> float:
    """How far a set of inputs as a whole is from the BatchNorm statistics, relative, mean over the layers."""
    seen = [teacher.observe(part.to(teacher.device)).samples for part in inputs.split(most)]
    return statistics([Moments.joined(layer) for layer in zip(*seen, strict=True)], teacher.references, "relative").item()


def alignment(
    samples: Sequence[Moments],  # aligned layers, each (N, C)
    labels: Tensor,  # (N,)
    centroids: Centroids,
    noise: Sequence[Moments],  # aligned layers, each (K, C), from `draw_diversity`
    references: Sequence[Reference],
    kind: Distance,
) -> Tensor:
    """L_SFDA over the classes of the batch whose centroid has been seen; 0 when there is none.

    A class of which the batch holds a single value per channel has no variance; only its mean is aligned.
    """
    rows = centroids.rows(labels)
    present, index = rows.unique(return_inverse=True)
    seen = centroids.seen[present].to(samples[0].mean.dtype)
    terms = []
    for layer, reference, centre, shift in zip(samples, references, centroids.layers, noise, strict=True):
        found, _ = class_moments(layer, index, len(present))
        spread = found.variance.detach().amax(1, keepdim=True) > 0
        variance = (centre.variance[present] + shift.variance[present]).clamp(min=0)
        target = Moments(centre.mean[present] + shift.mean[present], torch.where(spread, variance, found.variance.detach()))
        terms.append(distance(found, target, reference, kind))
    return (torch.stack(terms).mean(0) * seen).sum() / seen.sum().clamp(min=1)


def draw_diversity(
    rng: torch.Generator, references: Sequence[Reference], classes: int, mean_scale: float, variance_scale: float
) -> tuple[Moments, ...]:
    """Diversity noise e, e' for the centroids of each class, (classes, C) per layer.

    In units of the layer's running deviation and variance, since 0.03 means something else where values reach 100. It
    moves the target, so unlike the released code's term it has a gradient, and a class becomes a cloud and not a point.
    """
    drawn = []
    for layer in references:
        deviation, variance = layer.moments.variance.sqrt(), layer.moments.variance
        e_mean, e_variance = (torch.randn(classes, len(variance), generator=rng).to(variance) for _ in range(2))
        drawn.append(Moments(mean_scale * e_mean * deviation, variance_scale * e_variance * variance))
    return tuple(drawn)


@dataclass(frozen=True)
class Losses:
    """The four terms of one batch, unweighted."""

    classification: Tensor
    statistics: Tensor
    alignment: Tensor
    prior: Tensor

    def total(self, settings: ClusterQSettings) -> Tensor:
        """L, their weighted sum; the settings are those `of_inputs`, which have every weight."""
        assert settings.classification_weight is not None
        return (
            settings.classification_weight * self.classification
            + settings.statistics_weight * self.statistics
            + settings.alignment_weight * self.alignment
            + settings.prior_weight * self.prior
        )

    def note(self) -> str:
        """A few words for a progress bar."""
        return f"statistics {self.statistics:.3f}, class {self.classification:.3f}, alignment {self.alignment:.3f}"


def evaluate(
    x: Tensor,  # (N, *shape), what is being optimised; its prior counts before augmentation
    seen: Observation,  # what the teacher says of its augmented version
    labels: Tensor,
    teacher: Teacher,
    spec: InputSpec,
    settings: ClusterQSettings,
    centroids: Centroids | None,
    noise: Sequence[Moments],
) -> Losses:
    """All terms of one batch; alignment is 0 while there are no centroids, and so are both class terms without classes."""
    kind, first = settings.statistics_distance, teacher.first_aligned
    aligned = x.new_zeros(())
    if centroids is not None and teacher.classifies and settings.alignment_weight > 0:
        aligned = alignment(seen.samples[first:], labels, centroids, noise, teacher.references[first:], kind)
    return Losses(
        classification(seen.logits, labels) if seen.logits is not None else x.new_zeros(()),
        statistics(seen.samples, teacher.references, kind),
        aligned,
        total_variation(x, spec),
    )
