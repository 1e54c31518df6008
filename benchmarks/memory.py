"""The highest memory of a process that reconstructs a large network with many large images.

Weights and images are random: what is kept depends on their sizes alone, and nothing is scored. *Private* is what the process
holds for itself and the machine must provide; *resident* counts pages of memory-mapped files too, which the machine takes back
whenever it needs them. Both include torch, the host, the network and the images. Linux.

    python benchmarks/memory.py --json docs/figures/memory-resnet50.json && python benchmarks/tables.py
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import measuring
import quantizing
import recording
import torch
import torchvision
from rich.console import Console
from torch import nn

from inc_clusterq.adaptors.neural_compressor import NeuralCompressorAdaptor
from inc_clusterq.fingerprint import fingerprint
from inc_clusterq.inputs import InputSpec
from inc_clusterq.models import FloatModel
from inc_clusterq.reconstruction.settings import ReconstructionSettings

EVERY = 0.05  # seconds between two looks at the memory
CLASSES = 1000


@dataclass
class Peaks:
    """Highest memory in MB since the watch began."""

    private_mb: float = 0.0
    resident_mb: float = 0.0

    def look(self) -> None:
        """Take down what is used now; the system itself keeps the highest resident memory, and of private memory nothing."""
        self.private_mb = max(self.private_mb, measuring.memory_mb("RssAnon"))
        self.resident_mb = measuring.memory_mb("VmHWM")


def main() -> None:
    """Reconstruct once and print the peaks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="resnet50", help="of torchvision (default resnet50)")
    parser.add_argument("--images", type=int, default=1024, help="default 1024")
    parser.add_argument("--size", type=int, default=224, help="pixels of a side (default 224)")
    parser.add_argument("--iterations", type=int, default=20, help="steps per unit (default 20)")
    parser.add_argument("--budget", type=float, help="memory_budget in GB (default: that of the settings)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the figures")
    given = parser.parse_args()
    if given.net not in torchvision.models.list_models():
        parser.error(f"torchvision has no network {given.net!r}")
    console = Console(width=140)
    budget = {} if given.budget is None else {"memory_budget": given.budget}
    settings = ReconstructionSettings.model_validate({"iterations": given.iterations, "granularity": "modcap", **budget})
    console.print(f"{given.net}, {given.images} images of {given.size} pixels, W4A8, seed {given.seed}", highlight=False)
    recording.print_environment(console)

    torch.manual_seed(given.seed)
    spec = InputSpec((3, given.size, given.size))
    module: nn.Module = torchvision.models.get_model(given.net, weights=None).eval().requires_grad_(False)
    exported = NeuralCompressorAdaptor().export(FloatModel(given.net, module, spec, CLASSES, fingerprint(module, spec)))
    images = torch.rand(given.images, *spec.shape)
    with _watched() as peaks, tempfile.TemporaryDirectory() as workspace:
        quantizing.one_trial(exported, images, 4, 8, settings, given.seed, Path(workspace))
    figures = {
        "net": given.net,
        "images": given.images,
        "size": given.size,
        "iterations": given.iterations,
        "budget_gb": settings.memory_budget,
        "images_mb": images.nbytes / 2**20,
        "private_mb": peaks.private_mb,
        "resident_mb": peaks.resident_mb,
    }
    console.print(", ".join(f"{name} {value}" for name, value in figures.items()), highlight=False, soft_wrap=True)
    if given.json is not None:
        recording.write(given.json, f"python benchmarks/memory.py {shlex.join(sys.argv[1:])}", figures)


@contextmanager
def _watched() -> Iterator[Peaks]:
    """Peaks of what runs inside."""
    peaks, over = Peaks(), threading.Event()

    def watch() -> None:
        while not over.wait(EVERY):
            peaks.look()

    measuring.forget_peak()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peaks
    finally:
        over.set()
        watcher.join()
        peaks.look()


if __name__ == "__main__":
    main()
