"""What a step of the synthesis costs in the network itself: plain, with channels last, in bfloat16, compiled.

A step is the forward pass with the moments at every BatchNorm input, and the backward pass to the images. Weights and images
are random, since the time depends on their sizes alone. The ways are timed in turn, round by round. What was compiled before
this run is not used.

    python benchmarks/teacher.py --json docs/figures/teacher-NAME.json && python benchmarks/tables.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import common
import torch
import torchvision
from rich.console import Console
from torch import Tensor

from inc_clusterq.allocation import freed_memory_kept
from inc_clusterq.inputs import InputSpec
from inc_clusterq.synthesis.acceleration import compiled
from inc_clusterq.synthesis.objective import statistics as statistics_loss
from inc_clusterq.synthesis.teacher import Teacher, teach

CLASSES = 1000
WAYS = ("plain", "channels last", "bfloat16", "channels last, bfloat16", "compiled", "compiled, bfloat16")


def main() -> None:
    """Time every network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", default="resnet18,mobilenet_v2", help="of torchvision (default resnet18,mobilenet_v2)")
    parser.add_argument("--images", type=int, default=32, help="per step (default 32)")
    parser.add_argument("--size", type=int, default=224, help="pixels of a side (default 224)")
    parser.add_argument("--steps", type=int, default=3, help="per round (default 3)")
    parser.add_argument("--rounds", type=int, default=5, help="of which the median is taken (default 5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the figures")
    given = parser.parse_args()
    nets = given.nets.split(",")
    if unknown := set(nets) - set(torchvision.models.list_models()):
        parser.error(f"torchvision has no network {unknown.pop()!r}")
    console = Console(width=120)
    console.print(f"Steps of {given.images} images of {given.size} pixels, seed {given.seed}", highlight=False)
    common.print_environment(console)
    with tempfile.TemporaryDirectory() as cache, freed_memory_kept():  # the latter as the synthesis does
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        measured = {net: _timed(net, given.images, given.size, given.steps, given.rounds, given.seed) for net in nets}
    rows = [
        [net, *[f"{statistics.median(ways[way]):.0f}" if way in ways else "-" for way in WAYS], f"{seconds:.0f}"]
        for net, (ways, seconds) in measured.items()
    ]
    common.print_table("Milliseconds per step", ("network", *WAYS, "seconds to compile"), rows, console)
    if given.json:
        options = f"--images {given.images} --size {given.size} --steps {given.steps} --rounds {given.rounds}"
        words = f"python benchmarks/teacher.py --nets {given.nets} {options} --seed {given.seed} --json {given.json}"
        figures = {net: {"milliseconds": ways, "seconds_to_compile": seconds} for net, (ways, seconds) in measured.items()}
        common.record(given.json, words, {"images": given.images, "size": given.size, "nets": figures})


def _timed(net: str, images: int, size: int, steps: int, rounds: int, seed: int) -> tuple[dict[str, list[float]], float]:
    """Milliseconds per step of every round by way, and the seconds that compiling takes, without bfloat16."""
    torch.manual_seed(seed)
    spec = InputSpec((3, size, size))
    module = torchvision.models.get_model(net, weights=None).eval()
    x = torch.rand(images, *spec.shape).requires_grad_()
    with ExitStack() as stack:
        plain = stack.enter_context(teach(module, spec, num_classes=CLASSES, first_aligned_layer=None))
        began = time.perf_counter()
        fused = stack.enter_context(compiled(plain, spec, images))
        seconds = time.perf_counter() - began
        exact = {"plain": plain, "channels last": replace(plain, channels_last=True), "compiled": fused}
        rounded = {f"{way}, bfloat16".removeprefix("plain, "): replace(one, bfloat16=True) for way, one in exact.items()}
        ways = {way: {**exact, **rounded}[way] for way in WAYS}
        if fused is plain:  # the compiler has failed
            ways = {way: teacher for way, teacher in ways.items() if "compiled" not in way}
        for teacher in ways.values():
            _milliseconds(teacher, x, 1)  # the first costs more
        times = [{way: _milliseconds(teacher, x, steps) for way, teacher in ways.items()} for _ in range(rounds)]
    return {way: [one[way] for one in times] for way in ways}, seconds


def _milliseconds(teacher: Teacher, x: Tensor, steps: int) -> float:
    began = time.perf_counter()
    for _ in range(steps):
        seen = teacher.observe(x)
        torch.autograd.grad(statistics_loss(seen.samples, teacher.references, "relative"), x)
    return 1000 * (time.perf_counter() - began) / steps


if __name__ == "__main__":
    main()
