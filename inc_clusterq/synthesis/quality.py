"""How good a calibration set is, measured at the input of every BatchNorm layer; real inputs are measured alike.

With m, v the moments of the whole set per channel, mu and sigma^2 the running statistics, [a, b] the range of the values that
occur in a channel and [s, t] a range to be compared with:

    statistics distance   mean of (m - mu)^2 + (sqrt v - sigma)^2 over channels, by the mean of sigma^2    (0 is best)
    coverage              |[a, b] and [s, t]| / |[s, t]|, mean over channels                               (1 is best)
    excess                |[a, b] without [s, t]| / |[s, t]|, mean over channels                           (0 is best)
    separability          deviation between classes / deviation within, of the samples' channel means, in units of sigma;
                          variance components of a one-way analysis of variance, so that few samples do not flatter it
    variation             share of a channel's variance v that lies between the samples' means, mean over channels: 0 where
                          samples are alike, 1 where each is constant; running statistics do not tell it, real inputs do
    diversity             (sum lambda)^2 / sum lambda^2 of the covariance of those channel means: in how many directions
                          the samples spread (participation ratio)

The range that BatchNorm statistics imply is mu -+ 3 sigma (99.7 % of a normal distribution); a real one needs real inputs,
of which at most as many as synthetic ones are taken, since extremes grow with their number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from inc_clusterq.inputs import InputSpec
from inc_clusterq.synthesis.objective import distance, distance_of
from inc_clusterq.synthesis.refine import random_samples
from inc_clusterq.synthesis.statistics import Moments, Reference, batch_moments, capture_inputs, sample_moments
from inc_clusterq.synthesis.teacher import Teacher, teach

IMPLIED = 3.0  # deviations on either side of the mean
NEIGHBOURS = 512  # samples at most among which nearest ones are sought: all pairs are compared
BATCH = 64
EQUAL = 1e-12  # of the features' power: less than that between samples is rounding
NOISE = 64  # samples that are compared with
NO_BETTER = "It is no nearer to them than noise: check range, mean and std of model.input, and that gradients reach the input."


@dataclass(frozen=True)
class Range:
    """Lowest and highest value per channel, each of shape (C,)."""

    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class Seen:
    """What a set of N inputs gives at one layer."""

    samples: Moments  # (N, C)
    range: Range


@dataclass(frozen=True)
class LayerQuality:
    """The measures of one layer; None where there is nothing to compare with."""

    name: str
    statistics_distance: float
    implied_coverage: float
    implied_excess: float
    real_coverage: float | None
    real_excess: float | None
    separability: float | None
    variation: float
    diversity: float


@dataclass(frozen=True)
class SetQuality:
    """The measures of one set, layers in order of execution."""

    samples: int
    recognised: float | None  # share of samples that the model gives their own label
    noise_distance: float  # from the statistics, of noise around the middle of the value range, mean over layers
    nearest: float | None  # median distance of a sample to its nearest neighbour, root mean square, as a share of the range
    layers: tuple[LayerQuality, ...]

    def as_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)

    def mean(self, measure: str) -> float | None:
        """The mean of a measure over the layers."""
        values = [getattr(layer, measure) for layer in self.layers]
        return None if None in values else sum(values) / len(values)

    def sentence(self) -> str:
        """What the report of a job says of its set."""
        reached = sum(layer.statistics_distance for layer in self.layers) / len(self.layers)
        own = f", {self.recognised:.1%} of it recognised as the wanted class" if self.recognised is not None else ""
        told = (
            f"Synthetic set: {self.mean('implied_coverage'):.1%} of the ranges that the BatchNorm statistics imply, distance "
            f"from the statistics {reached:.3f} (mean of {len(self.layers)} layers; noise: {self.noise_distance:.3f}){own}."
        )
        return told if reached < self.noise_distance else f"{told} {NO_BETTER}"


@dataclass(frozen=True)
class Looked:
    """A set and what it gives: every layer, and the predicted classes (N,) of a classifier."""

    inputs: Tensor  # (N, *shape), normalised
    labels: Tensor  # (N,); -1: no class
    layers: tuple[Seen, ...]
    predicted: Tensor | None


@torch.no_grad()
def look(teacher: Teacher, inputs: Tensor, labels: Tensor) -> Looked:
    """Run a set through the network, batch by batch."""
    layers: list[list[Seen]] = [[] for _ in teacher.layers]
    predicted = []
    for batch in inputs.split(BATCH):
        x = batch.to(teacher.device, teacher.dtype)
        with capture_inputs(teacher.layers, partial(_seen, samples=len(x))) as captured:
            output = teacher.module(x)
        for found, layer in zip(layers, teacher.layers, strict=True):
            found.append(_merged(captured[layer]))
        if teacher.classifies:
            predicted.append(output.argmax(1).cpu())
    return Looked(inputs, labels, tuple(map(_joined, layers)), torch.cat(predicted) if predicted else None)


def noise_distance(teacher: Teacher, spec: InputSpec) -> float:
    """How far noise around the middle of the value range is from the BatchNorm statistics."""
    return distance_of(random_samples(spec, NOISE, torch.Generator().manual_seed(0)), teacher, BATCH)


def measure(looked: Looked, teacher: Teacher, spec: InputSpec, noise: float, real: Sequence[Range] | None = None) -> SetQuality:
    """All measures of a set; `noise` is `noise_distance`, and `real` holds the ranges of real inputs, layer by layer."""
    classes = None if int(looked.labels.min()) < 0 else looked.labels
    ranges: Sequence[Range | None] = real or [None] * len(looked.layers)
    pairs = zip(looked.layers, layer_names(teacher), teacher.references, ranges, strict=True)
    return SetQuality(
        len(looked.inputs),
        None if looked.predicted is None else float((looked.predicted == looked.labels).double().mean()),
        noise,
        nearest_distance(looked.inputs, spec),
        tuple(_layer(*pair, classes) for pair in pairs),
    )


def measure_set(module: nn.Module, spec: InputSpec, num_classes: int, inputs: Tensor, labels: Tensor) -> SetQuality:
    """All measures of a set that need no real input."""
    with teach(module, spec, num_classes=num_classes, first_aligned_layer=None) as teacher:
        return measure(look(teacher, inputs, labels), teacher, spec, noise_distance(teacher, spec))


def _layer(seen: Seen, name: str, reference: Reference, real: Range | None, classes: Tensor | None) -> LayerQuality:
    middle, variance = (moment.to(seen.samples.mean) for moment in (reference.moments.mean, reference.moments.variance))
    deviation = (variance + reference.eps).sqrt()
    running = Reference(Moments(middle, variance), reference.eps)
    coverage, excess = cover(seen.range, Range(middle - IMPLIED * deviation, middle + IMPLIED * deviation))
    real_coverage, real_excess = cover(seen.range, real) if real else (None, None)
    features = (seen.samples.mean - middle) / deviation
    return LayerQuality(
        name,
        float(distance(batch_moments(seen.samples), running.moments, running, "relative")),
        coverage,
        excess,
        real_coverage,
        real_excess,
        separability(features, classes) if classes is not None else None,
        variation(seen.samples),
        diversity(features),
    )


def cover(found: Range, wanted: Range) -> tuple[float, float]:
    """Coverage and excess of `wanted` by `found`; channels in which `wanted` is a single value are left out."""
    length = wanted.high - wanted.low
    counted = length > 0
    if not bool(counted.any()):
        return 1.0, 0.0
    common = (torch.minimum(found.high, wanted.high) - torch.maximum(found.low, wanted.low)).clamp(min=0)
    outside = (found.high - found.low) - common
    return float((common / length)[counted].mean()), float((outside / length)[counted].mean())


def separability(features: Tensor, labels: Tensor) -> float | None:
    """Deviation between classes by deviation within, from features (N, C); None where no class has two samples.

    With n_k samples in class k of K: MSW = sum |x - c_k|^2 / (N - K), MSB = sum n_k |c_k - c|^2 / (K - 1),
    between^2 = (MSB - MSW) / n_0 with n_0 = (N - sum n_k^2 / N) / (K - 1), at least 0.
    """
    _, index, counts = labels.unique(return_inverse=True, return_counts=True)
    samples, classes = len(labels), len(counts)
    if classes < 2 or samples <= classes:
        return None
    features, sizes = features.double(), counts.double()
    centroids = torch.zeros(classes, features.shape[1], dtype=torch.float64).index_add(0, index, features) / sizes[:, None]
    within = (features - centroids[index]).square().sum() / (samples - classes)
    between = (sizes[:, None] * (centroids - features.mean(0)).square()).sum() / (classes - 1)
    typical = (samples - sizes.square().sum() / samples) / (classes - 1)
    if within == 0:
        return None
    return float((((between - within) / typical).clamp(min=0) / within).sqrt())


def variation(samples: Moments) -> float:
    """Share of the variance between samples, from moments (N, C); constant channels are left out, 0 where all are."""
    between, whole = samples.mean.var(0, correction=0), batch_moments(samples).variance
    counted = whole > 0
    return float((between / whole)[counted].mean()) if bool(counted.any()) else 0.0


def diversity(features: Tensor) -> float:
    """Participation ratio of the covariance of features (N, C), from 1 to min(N - 1, C); 0 for samples that are all equal."""
    centred = (features - features.mean(0)).double()
    gram = centred @ centred.T if len(centred) < centred.shape[1] else centred.T @ centred
    energy = gram.square().sum()
    alike = bool(gram.trace() <= EQUAL * features.double().square().sum())  # what rounding leaves of equal samples
    return 0.0 if alike else float(gram.trace().square() / energy)


def nearest_distance(
    inputs: Tensor,  # (N, *shape), normalised
    spec: InputSpec,
) -> float | None:
    """Median over the first samples of the distance to the nearest other one; None for a single sample."""
    if len(inputs) < 2:
        return None
    low, high = spec.bounds(inputs)
    unit = ((inputs[:NEIGHBOURS] - low) / (high - low)).flatten(1)
    apart = torch.cdist(unit, unit, compute_mode="donot_use_mm_for_euclid_dist") / unit.shape[1] ** 0.5
    return float(apart.fill_diagonal_(float("inf")).min(1).values.median())


def project(features: Tensor) -> Tensor:
    """Features (N, C) in the plane of their two main components, (N, 2)."""
    centred = features - features.mean(0)
    rank = min(2, *centred.shape)
    with torch.random.fork_rng(devices=[]):  # pca_lowrank draws from the global generator
        torch.manual_seed(0)
        _, _, basis = torch.pca_lowrank(centred, q=min(6, *centred.shape), center=False)
    plane = centred @ basis[:, :rank]
    return torch.nn.functional.pad(plane, (0, 2 - rank))


def layer_names(teacher: Teacher) -> list[str]:
    """The modules' own names, in order of execution."""
    names: Mapping[nn.Module, str] = {module: name for name, module in teacher.module.named_modules()}
    return [names[layer] for layer in teacher.layers]


def _seen(x: Tensor, samples: int) -> Seen:
    over = [axis for axis in range(x.dim()) if axis != 1]
    return Seen(sample_moments(x, samples), Range(x.amin(over), x.amax(over)))


def _merged(calls: Sequence[Seen]) -> Seen:
    """The calls of one layer with the same samples: moments averaged, the range of all, on the CPU."""
    mean = torch.stack([call.samples.mean for call in calls]).mean(0)
    variance = torch.stack([call.samples.variance for call in calls]).mean(0)
    return Seen(Moments(mean.cpu(), variance.cpu()), _widest(calls))


def _joined(batches: Sequence[Seen]) -> Seen:
    """The samples of all batches."""
    return Seen(Moments.joined(batch.samples for batch in batches), _widest(batches))


def _widest(parts: Sequence[Seen]) -> Range:
    low = torch.stack([part.range.low for part in parts]).amin(0)
    return Range(low.cpu(), torch.stack([part.range.high for part in parts]).amax(0).cpu())
