"""Seconds per optimisation step of a unit, against a plain eager implementation of the same step.

A residual block of two 3x3 convolutions, at the three sizes of ResNet-20, at W4A4 with QDrop. The plain one writes the
formulas down as the papers have them: soft rounding and its regulariser, straight-through quantization of the activations
with a learned step size, a mask of random numbers at every quantizer, Adam. Both take the same 32 images per step; a third line
is ours with as many images as it takes by default. The two alternate within a round, so that a busy machine is busy for both.

    python benchmarks/step.py --json docs/figures/step-residual_block.json
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import measuring
import quantizing
import recording
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import conv2d

from inc_clusterq.layout import laid_out
from inc_clusterq.progress import NO_STAGE
from inc_clusterq.reconstruction.graph import extract
from inc_clusterq.reconstruction.learning import Flow, optimise
from inc_clusterq.reconstruction.settings import ReconstructionSettings

BITS = 4
IMAGES = 128
SIZES = ((16, 32), (32, 16), (64, 8))
WHOLE_BATCHES = {"step_positions": 1_000_000}


class Block(nn.Module):
    """Two convolutions and a shortcut, between layers that get 8 bits."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.second(torch.relu(self.first(x))) + x)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class PlainBlock(nn.Module):
    """The quantized block of `Block`, written down from the papers."""

    def __init__(self, block: Block, x: Tensor) -> None:
        super().__init__()
        self.convolutions = (block.first, block.second)
        self.scales = [conv.weight.abs().amax((1, 2, 3), keepdim=True) / (2 ** (BITS - 1) - 1) for conv in self.convolutions]
        self.floors = [(conv.weight / scale).floor() for conv, scale in zip(self.convolutions, self.scales, strict=True)]
        self.v = nn.ParameterList(torch.zeros_like(floor) for floor in self.floors)
        self.steps = nn.ParameterList(x.max() / (2**BITS - 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self._quantized(x, self.steps[0])
        between = self._quantized(torch.relu(self._convolved(x, 0)), self.steps[1])
        return torch.relu(self._convolved(between, 1) + x)

    def penalty(self, beta: float) -> Tensor:
        """The rounding regulariser."""
        return torch.stack([(1 - (2 * _soft(v) - 1).abs().pow(beta)).sum() for v in self.v]).sum()

    def _convolved(self, x: Tensor, number: int) -> Tensor:
        low, high = -(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1
        weight = self.scales[number] * (self.floors[number] + _soft(self.v[number])).clamp(low, high)
        outputs: Tensor = conv2d(x, weight, self.convolutions[number].bias, padding=1)
        return outputs

    def _quantized(self, x: Tensor, step: Tensor) -> Tensor:
        levels = x / step
        levels = levels + (levels.round() - levels).detach()
        return torch.where(torch.rand_like(x) < 0.5, x, levels.clamp(0, 2**BITS - 1) * step)


def _soft(v: Tensor) -> Tensor:
    return (torch.sigmoid(v) * 1.2 - 0.1).clamp(0, 1)


def main() -> None:
    """Time every size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="per round (default 200)")
    parser.add_argument("--rounds", type=int, default=5, help="of which the median is taken (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--json", type=Path, help="file for the figures")
    given = parser.parse_args()
    console = Console(width=120)
    console.print(f"Steps of a unit: seed {given.seed}, median of {given.rounds} rounds of {given.steps}", highlight=False)
    recording.print_environment(console)
    found: dict[str, dict[str, list[float]]] = {}
    for channels, size in SIZES:
        torch.manual_seed(given.seed)
        block = Block(channels).eval().requires_grad_(False)
        images = torch.randn(IMAGES, 3, size, size)
        timed = {
            "plain": _plain(block, images, given.steps),
            "ours, as many images": _ours(block, images, given.steps, given.seed, WHOLE_BATCHES),
            "ours": _ours(block, images, given.steps, given.seed, {}),
        }
        for run in timed.values():
            run()  # the first costs more
        rounds = [{name: measuring.milliseconds(run) / given.steps for name, run in timed.items()} for _ in range(given.rounds)]
        found[f"{channels} x {size} x {size}"] = {name: [one[name] for one in rounds] for name in timed}
    rows = [[output, *[f"{statistics.median(times):.2f}" for times in by_name.values()]] for output, by_name in found.items()]
    recording.print_table("Milliseconds per step", ("output", *timed), rows, console)
    if given.json:
        words = (
            f"python benchmarks/step.py --steps {given.steps} --rounds {given.rounds} --seed {given.seed} --json {given.json}"
        )
        recording.write(given.json, words, {"of": "a unit", "milliseconds": found})


def _plain(block: Block, images: Tensor, steps: int) -> Callable[[], None]:
    inputs = torch.relu(block.stem(images))
    targets = torch.relu(block.second(torch.relu(block.first(inputs))) + inputs)
    settings = ReconstructionSettings()

    def run() -> None:
        unit = PlainBlock(block, inputs)
        rounding = torch.optim.Adam(unit.v, lr=settings.rounding_rate)
        stepping = torch.optim.Adam(unit.steps, lr=settings.activation_learning_rate)
        for step in range(steps):
            chosen = torch.randint(IMAGES, (settings.batch_size,))
            x = inputs[chosen]
            x = torch.where(torch.rand_like(x) < 0.5, x, inputs[chosen])  # the float and the quantized input are one here
            loss = (unit(x) - targets[chosen]).square().sum(1).mean()
            if step >= settings.warm_up * steps:
                loss = loss + settings.rounding_weight * unit.penalty(20.0)
            rounding.zero_grad()
            stepping.zero_grad()
            loss.backward()
            rounding.step()
            stepping.step()

    return run


def _ours(block: Block, images: Tensor, steps: int, seed: int, keys: dict[str, int]) -> Callable[[], None]:
    """Nothing is kept back here, so that nothing but steps is timed."""
    settings = ReconstructionSettings.model_validate(
        {"iterations": steps, "validation_share": 0, "start": "nearest", "correct_bias": False, **keys}
    )
    quantized = quantizing.quantized_graph(block, images, BITS, settings, IMAGES)
    begin = {name: tensor.clone() for name, tensor in quantized.graph_module.state_dict().items()}
    units = [extract(quantized.graph_module, unit) for unit in quantized.units]
    with torch.no_grad():
        inputs = units[0](laid_out(images))
        targets = units[1](inputs)
    everything = torch.arange(IMAGES)
    flow = Flow(inputs, inputs.clone(), targets, None, everything, everything)

    def run() -> None:
        quantized.graph_module.load_state_dict(begin)
        optimise(units[1], flow, settings, torch.Generator().manual_seed(seed), NO_STAGE, "unit", set())

    return run


if __name__ == "__main__":
    main()
