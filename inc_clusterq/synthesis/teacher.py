"""The trained network as a teacher: its logits and the moments at its BatchNorm inputs, with the caller's model unharmed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inc_clusterq.errors import ConfigError, ModelError
from inc_clusterq.inputs import InputSpec
from inc_clusterq.layout import laid_out
from inc_clusterq.modes import evaluated
from inc_clusterq.synthesis.statistics import (
    Moments,
    Reference,
    average,
    batch_norms,
    capture_inputs,
    reference,
    sample_moments,
)


@dataclass(frozen=True)
class Observation:
    """What the teacher says of a batch."""

    logits: Tensor | None  # (N, K); None where the network returns something else
    samples: tuple[Moments, ...]  # per BatchNorm layer, each (N, C)

    @property
    def predicted(self) -> Tensor:
        """The most likely class of each sample, shape (N,)."""
        assert self.logits is not None, "only a classifier predicts"
        return self.logits.detach().argmax(1)


@dataclass(frozen=True)
class Teacher:
    """A frozen network with its BatchNorm layers in order of execution; alignment starts at layer `first_aligned`.

    Where it does not return class logits, `num_classes` is 0 and its BatchNorm statistics are all that it teaches.
    """

    module: nn.Module
    num_classes: int
    layers: tuple[nn.Module, ...]
    references: tuple[Reference, ...]
    first_aligned: int
    device: torch.device
    dtype: torch.dtype
    bfloat16: bool = False  # matrix products, where there is hardware for it
    channels_last: bool = False  # in memory, of images and of what the network makes of them
    passes: Callable[[Tensor], tuple[Any, tuple[Moments, ...]]] | None = None  # in place of `_passes`

    @property
    def classifies(self) -> bool:
        """Whether there are classes to be wanted, predicted and aligned."""
        return self.num_classes > 0

    @property
    def embedded(self) -> int:
        """Classes of a conditional generator; without any, all samples share one."""
        return max(self.num_classes, 1)

    def observe(self, x: Tensor) -> Observation:
        """Run a batch of normalised inputs, shape (N, *input)."""
        x = x.to(self.dtype)
        if self.channels_last:
            x = laid_out(x)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            output, samples = (self.passes or self._passes)(x)
        return Observation(output.float() if self.classifies else None, samples)

    def _passes(self, x: Tensor) -> tuple[Any, tuple[Moments, ...]]:
        with capture_inputs(self.layers, lambda seen: sample_moments(seen, x.shape[0])) as captured:
            output = self.module(x)
        return output, tuple(average(captured[layer]) for layer in self.layers)


@contextmanager
def teach(module: nn.Module, spec: InputSpec, *, num_classes: int, first_aligned_layer: int | None) -> Iterator[Teacher]:
    """Open `module` as a teacher: eval mode and no parameter gradients inside, everything as it was outside.

    `num_classes` is 0 for a model that does not return class logits; whatever it returns is then left alone.
    """
    layers = batch_norms(module)
    parameter = next(module.parameters(), None)
    anchor: Any = parameter if parameter is not None else layers[0].running_mean
    with frozen(module):
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            capture_inputs(layers, lambda seen: (seen.square().sum(), seen.shape[1])) as called,
        ):
            probe = spec.middle(2, anchor.device).to(anchor.dtype).requires_grad_()
            logits = module(probe * 1)  # no leaf, so that the model may write over it
        if num_classes and (not isinstance(logits, Tensor) or logits.shape != (2, num_classes)):
            found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ModelError(
                f"{type(module).__name__} returns {found} for two inputs of shape {list(spec.shape)}; class logits of "
                f"shape [2, {num_classes}] are needed"
            )
        if not called:
            raise ModelError(
                f"{type(module).__name__} holds {len(layers)} BatchNorm layers but calls none of them, so their "
                "statistics say nothing of its inputs; calibrate with real inputs through the host's static quantization"
            )
        reached = [power for calls in called.values() for power, _ in calls if power.requires_grad]
        if not reached:
            raise ModelError(
                f"{type(module).__name__} gives no gradient to its input: its forward runs in torch.no_grad() or "
                "torch.inference_mode(), or detaches what it computes, so nothing can be synthesised by it; "
                "freeze parameters by requires_grad_(False) instead"
            )
        _assert_differentiable(module, [*reached, *([logits.square().sum()] if num_classes else [])], probe)
        references = {layer: reference(layer) for layer in called}
        for layer, remembered in references.items():
            if found := [channels for _, channels in called[layer] if channels != len(remembered.moments.mean)]:
                raise ModelError(
                    f"a {type(layer).__name__} holds {len(remembered.moments.mean)} running means for an input of {found[0]} "
                    "channels (axis 1); only one of each per channel can be matched"
                )
        yield Teacher(
            module,
            num_classes,
            tuple(called),
            tuple(references.values()),
            first_aligned(len(called), first_aligned_layer),
            anchor.device,
            anchor.dtype,
        )


def _assert_differentiable(module: nn.Module, results: list[Tensor], probe: Tensor) -> None:
    """A model that runs may still overwrite what its gradient needs, which nobody notices who only applies it."""
    try:
        torch.autograd.grad([result for result in results if result.requires_grad], probe, allow_unused=True)
    except RuntimeError as error:
        told = str(error).split(": [")[0].split("\n")[0]  # without the tensors and the advice that PyTorch adds
        raise ModelError(
            f"{type(module).__name__} has no gradient with respect to its input, by which images are optimised: {told}; "
            "let operations in place (inplace=True, a trailing underscore, x += y) return new tensors instead"
        ) from error


def first_aligned(layers: int, wanted: int | None) -> int:
    """Index of the first aligned layer of `layers`: the wanted one, or the released code's floor((L + 1) / 2) - 2."""
    if wanted is None:
        return max(0, (layers + 1) // 2 - 2)
    if wanted >= layers:
        raise ConfigError(
            f"first_aligned_layer is {wanted}, but the model calls {layers} BatchNorm layers; "
            f"use 0 to {layers - 1}, or leave it out for the paper's choice"
        )
    return wanted


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Eval mode for every submodule and no gradient for any parameter; each one's own setting comes back."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        with evaluated(module):
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
