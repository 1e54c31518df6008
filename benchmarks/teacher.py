"""What a step of the synthesis costs in the network itself: plain, with channels last, in bfloat16, compiled.

A step is the forward pass with the moments at every BatchNorm input, and the backward pass to the images. Weights and images
are random, since the time depends on their sizes alone. The ways are timed in turn, round by round. What was compiled before
this run is not used.

    python benchmarks/teacher.py --json docs/figures/teacher-NAME.json && python benchmarks/tables.py
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import measuring
import recording
import torch
import torchvision
from arguments import timed_networks, timing_parser
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
    parser = timing_parser(__doc__, "resnet18,mobilenet_v2")
    parser.add_argument("--images", type=int, default=32, help="per step (default 32)")
    parser.add_argument("--steps", type=int, default=3, help="per round (default 3)")
    given = parser.parse_args()
    nets = timed_networks(parser, given)
    console = Console(width=120)
    console.print(f"Steps of {given.images} images of {given.size} pixels, seed {given.seed}", highlight=False)
    recording.print_environment(console)
    with tempfile.TemporaryDirectory() as cache, freed_memory_kept():  # the latter as the synthesis does
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        measured = {net: _timed(net, given.images, given.size, given.steps, given.rounds, given.seed) for net in nets}
    rows = [
        [net, *[f"{statistics.median(ways[way]):.0f}" if way in ways else "-" for way in WAYS], f"{seconds:.0f}"]
        for net, (ways, seconds) in measured.items()
    ]
    recording.print_table("Milliseconds per step", ("network", *WAYS, "seconds to compile"), rows, console)
    if given.json:
        options = f"--images {given.images} --size {given.size} --steps {given.steps} --rounds {given.rounds}"
        words = f"python benchmarks/teacher.py --nets {given.nets} {options} --seed {given.seed} --json {given.json}"
        figures = {net: {"milliseconds": ways, "seconds_to_compile": seconds} for net, (ways, seconds) in measured.items()}
        recording.write(given.json, words, {"images": given.images, "size": given.size, "nets": figures})


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
            _run(teacher, x, 1)  # the first costs more
        times = [
            {way: measuring.milliseconds(partial(_run, teacher, x, steps)) / steps for way, teacher in ways.items()}
            for _ in range(rounds)
        ]
    return {way: [one[way] for one in times] for way in ways}, seconds


def _run(teacher: Teacher, x: Tensor, steps: int) -> None:
    for _ in range(steps):
        seen = teacher.observe(x)
        torch.autograd.grad(statistics_loss(seen.samples, teacher.references, "relative"), x)


if __name__ == "__main__":
    main()
