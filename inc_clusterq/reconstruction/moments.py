"""First and second moments of a layer's inputs, float and quantized, over all calibration images and positions.

A convolution is a product of its weights with columns: the input values under the kernel at one position. A group of G has n
of them, for a depthwise convolution the 9 of its one channel. Neighbouring columns of a large map are much alike, so that only
those on a grid are taken, whose place goes from image to image through all that it can have.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor, fx
from torch.nn import functional

from inc_clusterq.attributes import attribute
from inc_clusterq.nodes import named_arguments
from inc_clusterq.reconstruction.fake_quantize import Mode
from inc_clusterq.reconstruction.graph import Unit, extract
from inc_clusterq.reconstruction.layers import Layer
from inc_clusterq.reconstruction.quantizers import in_mode

VALUES_AT_ONCE = 2**24  # of the columns, so that memory stays bounded
POSITIONS = 196  # of a map that are taken, about; more where the images are few:
COLUMNS = 64  # about, for each weight of a row

Pair = tuple[Tensor, Tensor]  # of the float network and of the quantized one


@dataclass(frozen=True)
class Moments:
    """Moments of the quantized input x^ and the float input x of one layer, in double precision."""

    covariance: Tensor  # Cov(x^), shape: (G, n, n)
    cross: Tensor  # Cov(x^, x), shape: (G, n, n)
    mean: Tensor  # E x^, shape: (G, n)
    float_mean: Tensor  # E x, shape: (G, n)
    samples: int  # columns that were seen


@dataclass(frozen=True)
class Outputs:
    """What the bias of a layer needs to know."""

    wanted: Tensor  # W E x, with the float input x, shape: (C,)
    input_mean: Tensor  # E x^, of the quantized input, shape: (G, n)
    deviation: Tensor  # of W x^, shape: (C,)


def has_columns(layer: Layer) -> bool:
    """Whether `columns` knows the layer's operator."""
    return layer.kind == "linear" or len(layer.shape) == 4


@torch.no_grad()
def collect(pairs: Iterable[Pair]) -> Moments:
    """Moments of all inputs of a layer, from `input_pairs`."""
    covariance = cross = mean = float_mean = torch.zeros((), dtype=torch.float64)
    samples = 0
    middle: Pair | None = None
    for a, b in pairs:
        if middle is None:
            middle = a.mean(-1, keepdim=True), b.mean(-1, keepdim=True)
        # About a rough mean, since single precision would lose a variance that is small against the mean's square.
        a, b = a - middle[0], b - middle[1]
        # Products in single precision, sums of them in double: the first are as good as free, the second long.
        covariance, cross = covariance + (b @ b.mT).double(), cross + (b @ a.mT).double()
        mean, float_mean = mean + b.sum(-1).double(), float_mean + a.sum(-1).double()
        samples += a.shape[-1]
    assert middle is not None
    mean, float_mean = mean / samples, float_mean / samples
    return Moments(
        covariance / samples - mean[..., None] * mean[:, None],
        cross / samples - mean[..., None] * float_mean[:, None],
        mean + middle[1].squeeze(-1).double(),
        float_mean + middle[0].squeeze(-1).double(),
        samples,
    )


def outputs_of(rows: Tensor, moments: Moments) -> Outputs:
    """From the moments of a layer's inputs; `rows` are its weights, shape (G, R, n), in double precision."""
    deviation = ((rows @ moments.covariance) * rows).sum(-1).clamp_min(0).sqrt()
    return Outputs((rows @ moments.float_mean[..., None]).flatten(), moments.mean, deviation.flatten())


@torch.no_grad()
def collect_outputs(
    rows: Tensor,  # weights, shape: (G, R, n)
    pairs: Iterable[Pair],
) -> Outputs:
    """The same as `outputs_of` where a row has too many weights for the square matrix that `collect` makes."""
    input_mean = wanted = mean = squares = torch.zeros((), dtype=torch.float64)
    samples = 0
    middle: Tensor | None = None
    for a, b in pairs:
        y = rows @ b
        middle = y.mean(-1, keepdim=True) if middle is None else middle
        y = y - middle  # about a rough mean, as in `collect`
        input_mean, wanted = input_mean + b.sum(-1).double(), wanted + (rows @ a.sum(-1, keepdim=True)).flatten().double()
        mean, squares = mean + y.sum(-1).double(), squares + y.square().sum(-1).double()
        samples += a.shape[-1]
    deviation = (squares / samples - (mean / samples).square()).clamp_min(0).sqrt()
    return Outputs(wanted / samples, input_mean / samples, deviation.flatten())


@torch.no_grad()
def input_pairs(
    graph_module: fx.GraphModule,
    unit: Unit,
    layer: Layer,
    float_inputs: Tensor,  # of the unit, shape: (N, ...)
    quantized_inputs: Tensor,
    batch_size: int,
) -> Iterator[Pair]:
    """Columns of the float and the quantized input of one layer of `unit`, each (G, n, columns), some images at a time.

    The quantized input passes the layers before it as they now are.
    """
    operator = next(node for node in graph_module.graph.nodes if node.name == layer.node)
    before = extract(graph_module, unit, input_of=layer.node)
    device = attribute(graph_module, layer.weight).device  # the inputs may be mapped
    seen, row = 0, layer.parameters // layer.shape[0]
    wanted = max(POSITIONS, -(-COLUMNS * row // len(float_inputs)))
    for float_batch, quantized_batch in zip(float_inputs.split(batch_size), quantized_inputs.split(batch_size), strict=True):
        with in_mode(before, Mode.FLOAT):
            x = before(float_batch.to(device))
        with in_mode(before, Mode.HARD):
            quantized = before(quantized_batch.to(device))
        for one, other in zip(_pieces(x, layer), _pieces(quantized, layer), strict=True):
            yield columns(one, layer, operator, wanted, seen), columns(other, layer, operator, wanted, seen)
            seen += len(one)


def columns(x: Tensor, layer: Layer, operator: fx.Node, wanted: int | None = None, seen: int = 0) -> Tensor:
    """Columns of a layer's input (N, C, ...), shape: (G, n, columns); all of them, or about `wanted` of each image.

    Those are on a grid, whose place depends on how many images have been `seen` before, so that all places are as frequent.
    """
    if layer.kind == "linear":
        return x.reshape(1, -1, x.shape[-1]).mT
    named = named_arguments(operator)
    kernel, stride, padding, dilation = layer.shape[2:], *(tuple(named[key]) for key in ("stride", "padding", "dilation"))
    x = functional.pad(x, (padding[1], padding[1], padding[0], padding[0])) if any(padding) else x
    reach = [step * (size - 1) + 1 for step, size in zip(dilation, kernel, strict=True)]
    outputs = [(size - covered) // step + 1 for size, covered, step in zip(x.shape[2:], reach, stride, strict=True)]
    grid = max(1, min(isqrt(outputs[0] * outputs[1] // wanted), *outputs)) if wanted else 1  # every so many, both ways
    apart = (stride[0] * grid, stride[1] * grid)
    parts = []
    for first in range(min(grid**2, len(x))):
        down, right = divmod((seen + first) % grid**2, grid)
        part = x[first :: grid**2, :, down * stride[0] :, right * stride[1] :]
        if kernel == (1, 1):
            found = part[:, :, :: apart[0], :: apart[1]].flatten(2)
        else:
            found = functional.unfold(part, kernel, dilation, 0, apart)
        images, _, positions = found.shape
        found = found.reshape(images, layer.groups, -1, positions)
        parts.append(found.permute(1, 2, 0, 3).reshape(layer.groups, -1, images * positions))
    return torch.cat(parts, -1)


def _pieces(x: Tensor, layer: Layer) -> tuple[Tensor, ...]:
    """The images of a batch, as many at once as memory allows."""
    overlap = 1 if layer.kind == "linear" else torch.Size(layer.shape[2:]).numel()
    pieces: tuple[Tensor, ...] = x.split(max(1, VALUES_AT_ONCE // (x[0].numel() * overlap)))
    return pieces
