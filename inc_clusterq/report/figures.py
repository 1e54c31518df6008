"""Figures as PNG: a gallery of inputs, two-dimensional clouds, a measure by layer."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from matplotlib.figure import Figure  # not pyplot: no display, no global state
from torch import Tensor

from inc_clusterq.inputs import InputSpec

COLUMNS = 10
DPI = 110


def gallery(
    inputs: Tensor,  # (N, *shape), normalised
    labels: Tensor,  # (N,); -1: no class
    spec: InputSpec,
) -> bytes:
    """Every input as a picture, with its class above it."""
    low, high = spec.bounds(inputs)
    unit = ((inputs - low) / (high - low)).clamp(0, 1)
    rows = math.ceil(len(inputs) / COLUMNS)
    figure = Figure(figsize=(COLUMNS, 1.2 * rows), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, x, label in zip(axes.flat, unit, labels.tolist(), strict=False):
        axis.imshow(picture(x).numpy(), cmap="gray", vmin=0, vmax=1, aspect="auto" if x.dim() < 3 else "equal")
        if label >= 0:
            axis.set_title(str(label), fontsize=7, pad=2)
    return _png(figure)


def picture(x: Tensor) -> Tensor:
    """A sample with values in [0, 1] as (H, W) or (H, W, 3): three channels as colours, otherwise the first one.

    Features (F,) and signals (C, L) are shown with one line per channel, volumes (C, D, H, W) by their middle slice.
    """
    if x.dim() < 3:
        return x.reshape(-1, x.shape[-1])
    if x.dim() == 4:
        x = x[:, x.shape[1] // 2]
    return x.permute(1, 2, 0) if x.shape[0] == 3 else x[0]


def clouds(parts: Mapping[str, tuple[Tensor, Tensor]]) -> bytes:
    """Points (N, 2) with classes (N,) side by side, on the same axes and with the same colours."""
    figure = Figure(figsize=(4.5 * len(parts), 4), layout="constrained")
    axes = figure.subplots(1, len(parts), sharex=True, sharey=True, squeeze=False)[0]
    for axis, (name, (points, classes)) in zip(axes, parts.items(), strict=True):
        axis.scatter(*points.T.numpy(), c=classes.numpy() % 10, cmap="tab10", vmin=0, vmax=9, s=8, alpha=0.7, linewidths=0)
        axis.set_title(f"{name}, {len(points)} samples", fontsize=9)
        axis.tick_params(labelsize=7)
    return _png(figure)


def by_layer(names: Sequence[str], measures: Mapping[str, Sequence[float]], title: str, *, log: bool = False) -> bytes:
    """One line per measure over the layers."""
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    axis = figure.subplots()
    for name, values in measures.items():
        axis.plot(range(len(names)), values, marker="o", markersize=3, linewidth=1, label=name)
    step = math.ceil(len(names) / 40)
    axis.set_xticks(range(0, len(names), step), names[::step], rotation=90, fontsize=6, parse_math=False)
    axis.tick_params(axis="y", labelsize=7)
    if log:
        axis.set_yscale("log")
    else:
        axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.set_title(title, fontsize=9)
    axis.legend(fontsize=7)
    return _png(figure)


def by_depth(passes: Mapping[str, Sequence[tuple[str, int, float]]], title: str) -> bytes:
    """One staircase per pass over the layers of a network, from its units (name, number of layers, value)."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axis = figure.subplots()
    starts: dict[int, str] = {}
    for name, units in passes.items():
        edges = [0, *accumulate(layers for _, layers, _ in units)]
        axis.stairs([value for _, _, value in units], edges, baseline=None, linewidth=1.5, label=name)
        starts.update(zip(edges, (unit for unit, _, _ in units), strict=False))
    axis.set_xticks(list(starts), list(starts.values()), rotation=90, fontsize=6, parse_math=False)
    axis.tick_params(axis="y", labelsize=7)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.set_title(title, fontsize=9)
    axis.legend(fontsize=7)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def first_of_each_class(labels: Tensor, count: int) -> Tensor:
    """Indices of at most `count` samples, a round of all classes first, then another, in ascending order of classes."""
    seen: dict[int, int] = {}
    ranked = []
    for position, label in enumerate(labels.tolist()):
        seen[label] = seen.get(label, 0) + 1
        ranked.append((seen[label], label, position))
    return torch.tensor([position for _, _, position in sorted(ranked)[:count]])
