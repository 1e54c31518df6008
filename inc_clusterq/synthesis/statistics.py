"""Means and variances at the input of BatchNorm layers: what the network remembers, and what a batch gives.

With x of shape (N, C, *space) at the input of a layer, per channel:

    one sample n:   m_n = mean of x_n over space,        v_n = mean of (x_n - m_n)^2 over space
    whole batch:    m   = mean of m_n over n,            v   = mean of v_n + (m_n - m)^2 over n
    class c:        m_c = mean of m_n over n of class c, v_c = mean of v_n + (m_n - m_c)^2 over n of class c

The last two lines are the law of total variance; so one pass over the large tensor gives all three.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from inc_clusterq.errors import ModelError
from inc_clusterq.layout import has_channels_last
from inc_clusterq.synthesis.blocks import row_blocks

T = TypeVar("T")


@dataclass(frozen=True)
class Moments:
    """Mean and biased variance per channel, each of shape (..., C)."""

    mean: Tensor
    variance: Tensor

    def detach(self) -> Moments:
        """The same values, cut from the graph."""
        return Moments(self.mean.detach(), self.variance.detach())

    @staticmethod
    def joined(parts: Iterable[Moments]) -> Moments:
        """Those of the samples of all parts, each (N, C), in one."""
        means, variances = zip(*((part.mean, part.variance) for part in parts), strict=True)
        return Moments(torch.cat(means), torch.cat(variances))


@dataclass(frozen=True)
class Reference:
    """What a BatchNorm layer remembers of the training data: mu and sigma^2, each of shape (C,), and its epsilon."""

    moments: Moments
    eps: float


def batch_norms(module: nn.Module) -> list[nn.Module]:
    """The BatchNorm layers that hold running statistics, in order of definition, a shared one once.

    Layers that behave like BatchNorm without being derived from it (torchvision's FrozenBatchNorm2d) count.
    """
    layers = [layer for layer in module.modules() if _remembers(layer)]
    if not layers:
        raise ModelError(
            f"{type(module).__name__} has no BatchNorm layer with running statistics, so nothing in it remembers the "
            "training data and no calibration set can be synthesised from it. If BatchNorm was folded into the "
            "convolutions, give the model from before folding; otherwise calibrate with real inputs, labelled or not, "
            "through the host's own static quantization (neural_compressor.torch.quantization.StaticQuantConfig)"
        )
    return layers


def _remembers(layer: nn.Module) -> bool:
    if not (isinstance(layer, _BatchNorm) or "BatchNorm" in type(layer).__name__):
        return False
    return all(isinstance(getattr(layer, name, None), Tensor) for name in ("running_mean", "running_var"))


def reference(layer: nn.Module) -> Reference:
    """Copy of the running statistics of one layer out of `batch_norms`."""
    # One that users wrote may hold them as (1, C, 1, 1).
    mean, variance = (getattr(layer, name).detach().clone().flatten() for name in ("running_mean", "running_var"))
    return Reference(Moments(mean, variance), float(getattr(layer, "eps", 1e-5)))


@contextmanager
def capture_inputs(layers: Sequence[nn.Module], reduce: Callable[[Tensor], T]) -> Iterator[dict[nn.Module, list[T]]]:
    """Collect `reduce(input)` of every call of `layers` while the context is open, in order of each layer's first call.

    The reduction runs at once, before later code can change the tensor in place.
    """
    captured: dict[nn.Module, list[T]] = {}

    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        captured.setdefault(layer, []).append(reduce(x))

    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


class _SampleMoments(torch.autograd.Function):
    """Mean and biased variance over an axis, which is not the first.

    `torch.var_mean` gives the same and costs two to six times as much as the rest of a small network's forward and
    backward on a CPU; this keeps to sums, products and one fused multiply-add in the backward:
    d/dx = g_m / S + 2 g_v (x - m) / S = (g_m / S - b m) + b x with b = 2 g_v / S.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        mean, variance = (x.new_empty(*x.shape[:axis], *x.shape[axis + 1 :]) for _ in range(2))
        with torch.autocast(x.device.type, enabled=False):  # which would take products in bfloat16
            for rows in row_blocks(x):
                # Two passes: E[x^2] - m^2 would lose every digit where a channel's mean is large against its deviation.
                torch.mean(x[rows], axis, out=mean[rows])
                centred = x[rows] - mean[rows].unsqueeze(axis)
                variance[rows] = torch.linalg.vecdot(centred, centred, dim=axis) / x.shape[axis]
        ctx.save_for_backward(x, mean)
        ctx.axis = axis
        return mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, mean_grad: Tensor, variance_grad: Tensor) -> tuple[Tensor, None]:
        (x, mean), axis = ctx.saved_tensors, ctx.axis
        slope = variance_grad * (2 / x.shape[axis])
        return torch.addcmul((mean_grad / x.shape[axis] - slope * mean).unsqueeze(axis), slope.unsqueeze(axis), x), None


def sample_moments(x: Tensor, samples: int) -> Moments:
    """Moments of each sample over space, shape (samples, C); `x` is (N, C, *space) with N a multiple of `samples`.

    N exceeds `samples` where a model folds time or patches into the batch, sample by sample; those count as space.
    """
    if x.shape[0] % samples:
        raise ModelError(
            f"a BatchNorm layer sees {x.shape[0]} rows for {samples} inputs; its rows must belong to single inputs for "
            "class statistics, so this model cannot be synthesised from"
        )
    rows, channels = x.shape[0] // samples, x.shape[1]
    if rows == 1 and has_channels_last(x):  # taking these apart would cost a copy
        flat, axis = x.permute(0, 2, 3, 1).flatten(1, 2), 1
    else:
        flat, axis = x.reshape(samples, rows, channels, math.prod(x.shape[2:])).transpose(1, 2).flatten(2), 2
    if x.dtype in (torch.bfloat16, torch.float16):
        flat = flat.float()  # moments of 8 binary digits would not tell how far they are off
    if torch.compiler.is_compiling():  # which makes one pass of it
        mean = flat.mean(axis, keepdim=True)
        return Moments(mean.squeeze(axis), (flat - mean).square().mean(axis))
    mean, variance = _SampleMoments.apply(flat, axis)
    return Moments(mean, variance)


def average(moments: Sequence[Moments]) -> Moments:
    """Average over the calls of a shared layer; its running statistics are averages over the calls just so."""
    if len(moments) == 1:
        return moments[0]
    return Moments(torch.stack([m.mean for m in moments]).mean(0), torch.stack([m.variance for m in moments]).mean(0))


def batch_moments(samples: Moments) -> Moments:
    """Moments of the whole batch, shape (C,), from those of its samples, shape (N, C)."""
    mean = samples.mean.mean(0)
    return Moments(mean, (samples.variance + (samples.mean - mean).square()).mean(0))


def class_moments(
    samples: Moments,  # (N, C)
    index: Tensor,  # (N,) int64 in 0..classes-1
    classes: int,
    counted: Tensor | None = None,  # (N,) bool; None: every sample
) -> tuple[Moments, Tensor]:
    """Moments per class, shape (classes, C), and how many samples each rests on, shape (classes,); 0 where none."""
    member = nn.functional.one_hot(index, classes).to(samples.mean.dtype)
    if counted is not None:
        member = member * counted.to(member.dtype).unsqueeze(1)
    counts = member.sum(0)
    share = (member / counts.clamp(min=1)).T  # (classes, N), rows sum to 1
    mean = share @ samples.mean
    variance = share @ (samples.variance + (samples.mean - mean[index]).square())
    return Moments(mean, variance), counts
