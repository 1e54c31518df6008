"""Train the embedded example: `python examples/train_digits.py` writes digits.safetensors next to this file.

Seeded SGD with a cosine schedule; small rotations, scalings and shifts as augmentation. The number of epochs is fixed:
the validation part chooses nothing, the test part is measured once, at the end. Command, accuracies and versions go
into the file's metadata.
"""

from __future__ import annotations

import argparse
import math
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from digits import digits_net, split
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample

ROTATION = math.radians(12)
SCALE = 0.12
SHIFT = 0.125
"""Half a pixel: the coordinates of `affine_grid` run from -1 to 1 over 8 pixels."""


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate, scale and shift each image (N, 1, 8, 8) at random, by bilinear sampling."""

    def spread(limit: float, *shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator) * 2 - 1) * limit

    count = len(images)
    angle, scale = spread(ROTATION, count), 1 + spread(SCALE, count)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    shift = spread(SHIFT, 2, count)
    matrix = torch.stack([torch.stack([cos, -sin, shift[0]], 1), torch.stack([sin, cos, shift[1]], 1)], 1)
    return grid_sample(images, affine_grid(matrix, list(images.shape), align_corners=False), align_corners=False)


def train(net: nn.Module, inputs: Tensor, labels: Tensor, *, epochs: int, batch: int, rate: float, seed: int) -> None:
    """Minimise the label-smoothed cross-entropy in place."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = math.ceil(len(inputs) / batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, epochs * steps, pct_start=0.1)
    net.train()
    for epoch in range(epochs):
        total = 0.0
        for part in torch.randperm(len(inputs), generator=generator).split(batch):
            loss = cross_entropy(net(augment(inputs[part], generator)), labels[part], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(part)
        if (epoch + 1) % 10 == 0:
            print(f"epoch {epoch + 1}/{epochs}: loss {total / len(inputs):.4f}", flush=True)
    net.eval()


@torch.no_grad()
def accuracy(net: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Share of correct answers, in per cent."""
    return 100 * float((net(inputs).argmax(1) == labels).double().mean())


def main() -> None:
    """Train, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("digits.safetensors"))
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=1978)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    parts = split()
    net = digits_net()
    options = {name: getattr(arguments, name) for name in ("epochs", "batch", "rate", "seed")}
    train(net, *parts.train, **options)
    record = {
        "command": shlex.join(["python", "examples/train_digits.py", *sys.argv[1:]]),
        **{name: str(value) for name, value in options.items()},
        "validation_accuracy": f"{accuracy(net, *parts.validation):.2f}",
        "test_accuracy": f"{accuracy(net, *parts.test):.2f}",
        "torch": torch.__version__,
        "scikit_learn": version("scikit-learn"),
        "python": platform.python_version(),
    }
    save_file({name: value.contiguous() for name, value in net.state_dict().items()}, arguments.output, metadata=record)
    print(*(f"{key}: {value}" for key, value in record.items()), sep="\n")
    print(f"{arguments.output.name}: {arguments.output.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
