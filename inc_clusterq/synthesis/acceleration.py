"""The teacher's passes made faster: with channels last in memory, as compiled code, and in bfloat16.

Compiled, what stands between two convolutions is done in one pass over the memory; a small depthwise network at 224 pixels
spends most of a step there. That costs as much as ten to thirty steps, so it is for long runs on large images. What the
compiler does not take is run as it stands, which is slower and no more. A processor with instructions for it multiplies
bfloat16 much faster than float32; depthwise convolutions are no products of matrices, and gain nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from inc_clusterq.cpu import cpu
from inc_clusterq.inputs import InputSpec, is_large
from inc_clusterq.synthesis.settings import ClusterQSettings
from inc_clusterq.synthesis.statistics import Moments, average, sample_moments
from inc_clusterq.synthesis.teacher import Teacher

logger = logging.getLogger(__name__)

WORTH_IT = 200  # steps; benchmarks/teacher.py tells what compiling costs, and what it saves
BFLOAT16 = {"amx_bf16", "avx512_bf16"}  # instructions that multiply it


def is_in_bfloat16(settings: ClusterQSettings, spec: InputSpec, teacher: Teacher) -> bool:
    """Whether the teacher computes in bfloat16: as the settings say, or dense networks on large images where it is fast."""
    if settings.bfloat16 is not None:
        return settings.bfloat16
    grouped = any(getattr(part, "groups", 1) > 1 for part in teacher.module.modules())
    suits = is_large(spec.shape) and teacher.dtype == torch.float32 and not grouped
    return suits and teacher.device.type == "cpu" and not BFLOAT16.isdisjoint(cpu().flags)


def is_compiled(settings: ClusterQSettings, spec: InputSpec, batches: int, device: torch.device) -> bool:
    """Whether the teacher is to be compiled: as the settings say, or for long runs on large images on a CPU."""
    if settings.synthesizer == "latent":  # whose swinging changes the network from step to step
        return False
    if settings.compile_teacher is not None:
        return settings.compile_teacher
    steps = batches * (settings.refine_iterations - settings.coarse_iterations)
    return device.type == "cpu" and is_large(spec.shape) and steps >= WORTH_IT


def is_channels_last(spec: InputSpec, teacher: Teacher) -> bool:
    """Whether images lie with channels last: on a CPU, where the network takes them so.

    One that takes its maps apart by `view` does not.
    """
    if len(spec.shape) != 3 or teacher.device.type != "cpu":
        return False
    return _failure(replace(teacher, channels_last=True), spec, 2) is None


@contextmanager
def compiled(teacher: Teacher, spec: InputSpec, samples: int) -> Iterator[Teacher]:
    """The same teacher, compiled for `samples` inputs at once, and for other numbers as they come; as it is, if that fails.

    On leaving, everything that this process has compiled is forgotten, and what is still in use is compiled again.
    """
    watched = _Watched(teacher)
    run = torch.compile(watched, dynamic=False)

    def passes(x: Tensor) -> tuple[Any, tuple[Moments, ...]]:
        output, pairs = run(x)
        return output, tuple(Moments(mean, variance) for mean, variance in pairs)

    faster = replace(teacher, passes=passes, channels_last=False)  # the compiler lays memory out as it sees fit
    try:
        failure = _failure(faster, spec, samples)
        if failure is None:
            yield faster
        else:
            reason = str(failure).strip().split("\n")[0]
            logger.warning(
                "the model can't be compiled (%s: %s) and is run as it stands, slower", type(failure).__name__, reason
            )
            watched.close()
            yield teacher
    finally:
        watched.close()
        torch.compiler.reset()  # of one function it keeps 8 variants, so that the 9th would depend on what ran before


def _failure(teacher: Teacher, spec: InputSpec, samples: int) -> Exception | None:
    """What goes wrong in a step of it, which compiles what is to be compiled; there are too many ways to list."""
    probe = spec.middle(samples, teacher.device).requires_grad_()
    try:
        seen = teacher.observe(probe.clone())  # like the images, which are not what is optimised, but made of it
        torch.stack([layer.variance.sum() for layer in seen.samples]).sum().backward()
    except Exception as failure:
        return failure
    return None


class _Watched(nn.Module):
    """The network with the moments at its BatchNorm inputs, by hooks that are there before a compiler looks at it."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.module, self._samples = teacher.module, 0  # 0 outside `forward`, when hooks have nothing to do
        self._seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in teacher.layers]
        hooks = zip(teacher.layers, self._seen, strict=True)
        self._handles = [layer.register_forward_pre_hook(self._watch(seen), with_kwargs=True) for layer, seen in hooks]

    def forward(self, x: Tensor) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
        """What the network returns, and mean and variance per BatchNorm layer, each (N, C)."""
        self._samples = x.shape[0]
        output = self.module(x)
        self._samples = 0
        layers = [average([Moments(*pair) for pair in seen]) for seen in self._seen]
        for seen in self._seen:  # now, and not at the start: code is compiled for lists as it finds them
            seen.clear()
        return output, [(layer.mean, layer.variance) for layer in layers]

    def close(self) -> None:
        """Take the hooks off the network."""
        for handle in self._handles:
            handle.remove()

    def _watch(self, seen: list[tuple[Tensor, Tensor]]) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._samples:
                moments = sample_moments(args[0] if args else kwargs["input"], self._samples)
                seen.append((moments.mean, moments.variance))

        return hook
