"""Simulated quantizers that stand where the host's observers stood in the prepared graph.

Activations: unsigned affine per tensor, with learned step size (LSQ, arXiv 1902.08153) and, for two-sided tensors, a
learned zero point (LSQ+, arXiv 2004.09576), and random dropping of the quantization (QDrop, arXiv 2203.05740):
    ^x = s (clip(round(x / s) + z, 0, 2^b - 1) - z)
    x~ = x with probability p, ^x otherwise, element by element, while a unit is optimised.
Weights: symmetric per channel, rounding learned (`rounding.py`); `joint` trains the step size too while the integers'
floor B = floor(W / s0) stays frozen (Genie-M, arXiv 2212.04780).
Biases: in float, with a correction that keeps the mean of the layer's output (DFQ, arXiv 1906.04721, Sec. 4.2).
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from inc_clusterq.reconstruction.dropping import draw_mask
from inc_clusterq.reconstruction.ranges import EPSILON, activation_range, signed_levels, weight_scale
from inc_clusterq.reconstruction.rounding import initial_v, soft_rounding
from inc_clusterq.reconstruction.sums import inner

SAMPLE_PER_CALL = 8192  # values kept of each observed tensor for the range search; extremes are kept exactly


class Mode(Enum):
    """What a quantizer does with what passes through it."""

    FLOAT = "float"  # hands it on
    OBSERVE = "observe"  # hands it on and remembers its range
    LEARN = "learn"  # soft weights; activations quantized, some dropped
    STEPS = "steps"  # as LEARN, but the weights' integers are those that are deployed
    HARD = "hard"  # exactly what is deployed


class _LearnedStep(torch.autograd.Function):
    """Quantize-dequantize with the LSQ+ gradients of scale and zero point (None: 0); dropped elements pass unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | None, top: int, dropped: Tensor | None) -> Tensor:
        levels = (x * (1.0 / scale)).round_()
        if zero_point is not None:
            levels.add_(zero_point)
        y = levels.clamp(0, top)
        # 1 where the gradient of x passes: inside the range or dropped. A float, since multiplying by booleans is slow.
        passes = torch.eq(levels, y, out=levels)
        y = (y if zero_point is None else y.sub_(zero_point)).mul_(scale)
        if dropped is not None:
            y = y.lerp_(x, dropped)
            passes = torch.maximum(passes, dropped, out=passes)
        ctx.save_for_backward(x, scale, passes, y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, scale, passes, y = ctx.saved_tensors
        # d ^x / d s = (^x - x) / s inside the range and ^x / s outside; d ^x / d z = 0 inside and -s outside.
        # A dropped element has ^x = x and counts as inside, so it adds nothing to either.
        grad_x = grad * passes
        grad_scale = ((inner(grad, y) - inner(grad_x, x)) / scale).reshape(scale.shape)
        grad_zero_point = -scale * (grad.sum() - grad_x.sum()) if ctx.needs_input_grad[2] else None
        return grad_x, grad_scale, grad_zero_point, None, None


class ActivationQuantizer(nn.Module):
    """Unsigned affine per-tensor quantizer of `bits` bits; its step is learned on a relative scale."""

    def __init__(self, bits: int, norm: float) -> None:
        super().__init__()
        self.bits, self.norm = bits, norm
        self.mode = Mode.FLOAT
        self.drop_probability = 0.0
        self.generator: torch.Generator | None = None
        self.start_scale: Tensor
        self.start_zero_point: Tensor
        self.register_buffer("start_scale", torch.ones(()))
        self.register_buffer("start_zero_point", torch.zeros(()))
        self.scale_shift = nn.Parameter(torch.zeros(()))  # log(s / s0)
        self.zero_point_shift = nn.Parameter(torch.zeros(()))  # (z - z0) / (2^b - 1)
        self._low, self._high = float("inf"), float("-inf")
        self._sample: list[Tensor] = []

    @property
    def top(self) -> int:
        """Highest integer, 2^b - 1."""
        return int(2**self.bits - 1)

    @property
    def observed(self) -> bool:
        """Whether values have passed since the last initialisation."""
        return bool(self._sample)

    @property
    def one_sided(self) -> bool:
        """Nothing below zero was seen (after a ReLU): the zero point stays at 0."""
        return float(self.start_zero_point) == 0.0

    def forward(self, x: Tensor) -> Tensor:
        if self.mode is Mode.FLOAT:
            return x
        if self.mode is Mode.OBSERVE:
            self._remember(x)
            return x
        scale, zero_point = self.parameters_now()
        if self.mode is Mode.HARD:
            zero_point = zero_point.round().clamp(0, self.top)
            levels = (x * (1.0 / scale)).round() + zero_point
            return (levels.clamp(0, self.top) - zero_point) * scale
        dropped = draw_mask(x, self.drop_probability, self.generator) if self.drop_probability else None
        if x.device.type == "cpu" and self.one_sided:  # a GPU would have to be waited for to know
            result: Tensor = _LearnedStep.apply(x, scale, None, self.top, dropped)
            return result
        # straight-through rounding of the zero point
        zero_point = zero_point + (zero_point.round().clamp(0, self.top) - zero_point).detach()
        result = _LearnedStep.apply(x, scale, zero_point, self.top, dropped)
        return result

    def parameters_now(self) -> tuple[Tensor, Tensor]:
        """Scale and (real-valued) zero point as they stand."""
        scale = self.start_scale * self.scale_shift.exp()
        return scale, self.start_zero_point + self.zero_point_shift * self.top

    def deployed(self) -> tuple[float, int]:
        """Scale and integer zero point as they are handed over."""
        scale, zero_point = self.parameters_now()
        return float(scale.detach()), int(zero_point.detach().round().clamp(0, self.top))

    def fix(self, scale: float, zero_point: int) -> None:
        """Set the quantizer to known values."""
        with torch.no_grad():
            self.start_scale.fill_(scale)
            self.start_zero_point.fill_(zero_point)
            self.scale_shift.zero_()
            self.zero_point_shift.zero_()

    def initialise(self) -> None:
        """Take the range that the observed values ask for, and forget them."""
        if self._sample:
            self.fix(*activation_range(torch.cat(self._sample), self._low, self._high, self.bits, self.norm))
        self._sample, self._low, self._high = [], float("inf"), float("-inf")

    def _remember(self, x: Tensor) -> None:
        flat = x.detach().flatten()
        self._low, self._high = min(self._low, float(flat.min())), max(self._high, float(flat.max()))
        # An odd stride does not fall into step with image rows or channels.
        stride = max(1, flat.numel() // SAMPLE_PER_CALL) | 1
        self._sample.append(flat[::stride].clone())


class WeightQuantizer(nn.Module):
    """Symmetric per-channel weight quantizer of `bits` bits with learned rounding."""

    def __init__(self, weight: Tensor, bits: int, norm: float, joint: bool = False) -> None:
        super().__init__()
        self.bits, self.joint = bits, joint
        self.mode = Mode.FLOAT
        self.start_scale: Tensor
        self.floor: Tensor
        self.integers: Tensor
        self.register_buffer("start_scale", weight_scale(weight, bits, norm))
        levels = weight.detach() / self.start_scale
        self.register_buffer("floor", levels.floor())
        self.register_buffer("integers", levels.round().clamp(*signed_levels(bits)))
        self.v = nn.Parameter(initial_v(levels - levels.floor()))
        self.scale_shift = nn.Parameter(torch.zeros_like(self.start_scale))  # log(s / s0)

    @property
    def scale(self) -> Tensor:
        """Step size as it stands, shape (C, 1, ...)."""
        return self.start_scale * self.scale_shift.exp() if self.joint else self.start_scale

    def forward(self, weight: Tensor) -> Tensor:
        if self.mode in (Mode.FLOAT, Mode.OBSERVE):
            return weight
        if self.mode is Mode.HARD:
            return self.deployed()
        if self.mode is Mode.STEPS:
            return self.integers * self.scale
        return (self.floor + soft_rounding(self.v)).clamp(*signed_levels(self.bits)) * self.scale

    def restart(self, levels: Tensor, scale: Tensor) -> None:
        """Begin at the real-valued `levels` (of W's shape) in units of `scale`; unless learned, they round to nearest."""
        with torch.no_grad():
            self.fix(levels.round().clamp(*signed_levels(self.bits)), scale)
            self.floor.copy_(levels.floor())
            self.v.copy_(initial_v(levels - levels.floor()))

    def harden(self, learned: bool) -> None:
        """Fix the integers, at the rounding that V has chosen if it was `learned`; they are what is deployed."""
        with torch.no_grad():
            integers = self.floor + (self.v >= 0).to(self.floor.dtype) if learned else self.integers
            self.fix(integers.clamp(*signed_levels(self.bits)), self.scale)

    def fix(self, integers: Tensor, scale: Tensor) -> None:
        """Set the quantizer to known integers and scales."""
        with torch.no_grad():
            self.integers.copy_(integers)
            self.start_scale.copy_(scale.reshape(self.start_scale.shape).clamp_min(EPSILON))
            self.scale_shift.zero_()

    def deployed(self) -> Tensor:
        """The float tensor that quantizes to exactly the chosen integers."""
        return (self.integers * self.start_scale).detach()


class BiasCorrection(nn.Module):
    """What a layer's bias gets, so that the mean of the layer's output stays what it was in the float network:

        b' = b + W m - ^W m^ + u c
    with the means m and m^ of the layer's float and quantized input (one per weight of a row). While ^W is being learned
    the bias follows it, so that a change of rounding costs no shift of the mean: without this the shift is all that the
    gradient sees, since inputs behind a ReLU are far from centred. c is learned, u is its unit. Once it is fixed the
    correction no longer follows, and what is learned comes on top of it.
    """

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.mode = Mode.FLOAT
        self.shift: Tensor
        self.unit: Tensor
        self.register_buffer("shift", torch.zeros_like(bias))
        self.register_buffer("unit", torch.zeros_like(bias))  # 0: nothing is learned
        self.c = nn.Parameter(torch.zeros_like(bias))
        self._wanted, self._mean = torch.zeros_like(bias), torch.empty(0)

    @property
    def _follows(self) -> bool:
        return bool(len(self._mean))

    def forward(self, bias: Tensor, weight: Tensor) -> Tensor:  # weight: as the layer gets it
        if self.mode in (Mode.FLOAT, Mode.OBSERVE):
            return bias
        if self.mode is Mode.HARD:
            return bias + self.shift
        return bias + self._shift(weight)

    def start(
        self,
        weight: Tensor,  # ^W to begin with
        wanted: Tensor,  # W m, shape: (C,)
        mean: Tensor,  # m^, shape: (groups, n)
        unit: Tensor,  # u, shape: (C,)
    ) -> None:
        """Take the means of a layer's inputs."""
        self._wanted, self._mean = wanted, mean
        with torch.no_grad():
            self.unit.copy_(unit)
            self.c.zero_()
        self.harden(weight)

    def harden(self, weight: Tensor) -> None:
        """Set the correction to what the weight that is deployed, and what was learned, ask for."""
        with torch.no_grad():
            self.shift.copy_(self._shift(weight))
            if not self._follows:
                self.c.zero_()

    def fix(self, shift: Tensor, unit: Tensor) -> None:
        """Set the correction to a known value, and the unit of what may be learned on top of it."""
        with torch.no_grad():
            self.shift.copy_(shift)
            self.unit.copy_(unit)
            self.c.zero_()
        self._mean = torch.empty(0)

    def _shift(self, weight: Tensor) -> Tensor:
        learned = self.unit * self.c
        if not self._follows:
            return self.shift + learned
        rows = weight.reshape(len(self._mean), -1, self._mean.shape[1])
        return self._wanted - (rows @ self._mean[..., None]).flatten() + learned
