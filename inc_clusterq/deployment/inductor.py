"""Compile for x86 with Inductor, check that the compiled model computes what was evaluated, and time it.

Freezing is what makes the back end choose int8 kernels; without it every convolution silently stays in float. The
evaluated model is computed as the kernels compute it (`inc_clusterq.deployment.arithmetic`), and the compiled one is equal
to it to the bit wherever all layers are int8. Float layers add up in another order, and other run times round elsewhere;
a value next to the border between two integers may then fall to either side. The check therefore bounds the mean
deviation, not the single largest one. A lost clamp, the fault it is there for, moves every image.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

import inc_clusterq.deployment.backend  # noqa: F401  # without it Inductor has no int8 kernels
from inc_clusterq.difference import drawn_in
from inc_clusterq.errors import DeploymentError

Compiled = Callable[[Tensor], Tensor]
TOLERANCE = 0.01  # root mean square of the difference, as a share of the outputs' range
OUT_OF_RANGE = 4.0  # factor on the inputs that drives activations beyond their calibrated ranges
BATCH = 64  # images per call of the evaluated model


@dataclass(frozen=True)
class Parity:
    """How far the deployed model is from the evaluated one."""

    images: int
    in_range: float  # root mean square difference as a share of the outputs' range
    out_of_range: float  # the same on inputs beyond the calibrated range
    agreement: float  # share of equal classes on the in-range inputs
    largest: float  # largest single difference on the in-range inputs, as a share of the outputs' range
    identical: float  # share of the in-range inputs whose outputs are equal to the bit

    def __str__(self) -> str:
        return (
            f"equal to the bit on {self.identical:.2%} of {self.images} images, same class on {self.agreement:.2%}, deviation "
            f"{self.in_range:.3%} of the output range ({self.out_of_range:.3%} on inputs beyond it)"
        )


def check_compiler() -> None:
    """Raise DeploymentError where the machine has no C++ compiler, before any work that would end with that."""
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise DeploymentError(f"models cannot be compiled: {_cause(error)}") from error


def compile_frozen(
    model: nn.Module,
    example: Tensor,  # shape: (1, *shape)
) -> Compiled:
    """The model compiled for the shape of `example`, weights frozen in.

    Raises:
        DeploymentError: the compiler failed, for example because the machine has no C++ compiler.
    """
    compiled: Compiled = torch.compile(model, dynamic=False)
    try:
        # The setting, not `options={"freezing": True}`: with that the int8 weight packing fails on the host's own models.
        with torch.no_grad(), inductor_config.patch(freezing=True):
            compiled(example.contiguous())
    except Exception as error:  # the compiler raises whatever its stages raise
        raise DeploymentError(f"the model cannot be compiled: {_cause(error)}") from error
    # Inputs that lie otherwise in memory would have it compiled again, and without the setting.
    return lambda inputs: compiled(inputs.contiguous())


def _cause(error: BaseException) -> str:
    """What was raised first, which the compiler wraps in errors of its own; where it says nothing, the place."""
    seen = [error]
    while not isinstance(error, CppCompileError):
        inner = error.__cause__ or getattr(error, "inner_exception", None)
        if inner is None or inner in seen:
            break
        seen.append(error := inner)
    if isinstance(error, CppCompileError):
        lines = error.output.strip().splitlines() or ["it says nothing"]
        return f"the C++ compiler failed: {next((line for line in lines if 'error' in line.lower()), lines[-1])}"
    said = str(error).strip().splitlines()
    if not said and (places := traceback.extract_tb(error.__traceback__)):
        said = [f"{Path(places[-1].filename).name}, line {places[-1].lineno}: {places[-1].line}"]
    hint = " (Inductor needs one, for example g++, on the path)" if isinstance(error, InvalidCxxCompiler) else ""
    return f"{type(error).__name__}: {said[0] if said else ''}{hint}"


@torch.no_grad()
def check_parity(
    evaluated: nn.Module,
    deployed: Compiled,
    inputs: Tensor,  # shape: (N, *shape)
) -> Parity:
    """Compare image by image, in and beyond the calibrated range.

    Raises:
        DeploymentError: the deployed model computes something else.
    """
    within, beyond = _compare(evaluated, deployed, inputs), _compare(evaluated, deployed, inputs * OUT_OF_RANGE)
    if not (within.rms <= TOLERANCE and beyond.rms <= TOLERANCE):  # so that NaN raises too
        raise DeploymentError(
            f"the deployed model differs from the evaluated one by {max(within.rms, beyond.rms):.2%} of the output range "
            f"(at most {TOLERANCE:.0%} is allowed); it must not be deployed"
        )
    return Parity(len(inputs), within.rms, beyond.rms, within.agreement, within.largest, within.identical)


@dataclass(frozen=True)
class Difference:
    """Two sets of outputs, as shares of the expected ones' range (`_spread`) or of the images."""

    rms: float
    largest: float
    agreement: float
    identical: float


def difference(
    found: Tensor,  # shape: (N, classes)
    expected: Tensor,  # shape: (N, classes)
) -> Difference:
    """How far `found` is from `expected`."""
    spread = _spread(expected)
    apart = found - expected
    return Difference(
        rms=float(apart.square().mean().sqrt()) / spread,
        largest=float(apart.abs().max()) / spread,
        agreement=float((found.argmax(1) == expected.argmax(1)).double().mean()),
        identical=float((found == expected).flatten(1).all(1).double().mean()),
    )


def _spread(expected: Tensor) -> float:
    """The range of the outputs, single classes aside."""
    usual = drawn_in(expected)
    return max(float(usual.max() - usual.min()), 1e-12)


def _compare(evaluated: nn.Module, deployed: Compiled, inputs: Tensor) -> Difference:
    expected = torch.cat([evaluated(batch) for batch in inputs.split(BATCH)])
    return difference(torch.cat([deployed(image) for image in inputs.split(1)]), expected)
