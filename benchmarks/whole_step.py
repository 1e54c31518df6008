"""Milliseconds of a step of the pass end to end, and what makes it shorter, one after the other:

  autograd          maps as images usually lie, the gradient of every weight, the fewest images at once
  channels last     the same with the channels last in memory
  from outputs      and with the gradients of step sizes and biases taken from what layers return
  ours              and as many images at once as by default
A step is of 16 images with all its gradients, at W4A4. Weights and images are random, since the time depends on their sizes
alone. The ways are timed in turn, round by round.

    python benchmarks/whole_step.py --json docs/figures/step-whole.json && python benchmarks/tables.py
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import measuring
import quantizing
import recording
import torch
import torchvision
from arguments import timed_networks, timing_parser
from rich.console import Console
from torch import Tensor, fx

from inc_clusterq.layout import laid_out
from inc_clusterq.reconstruction.end_to_end import BATCH, end_to_end_loss, images_at_once
from inc_clusterq.reconstruction.fake_quantize import Mode
from inc_clusterq.reconstruction.from_outputs import with_gradients_from_outputs
from inc_clusterq.reconstruction.graph import extract, join
from inc_clusterq.reconstruction.quantizers import set_mode
from inc_clusterq.reconstruction.settings import FEWEST_IMAGES, ReconstructionSettings

BITS = 4


def main() -> None:
    """Time every network."""
    parser = timing_parser(__doc__, "resnet18,mobilenet_v2,mnasnet0_5,shufflenet_v2_x0_5")
    given = parser.parse_args()
    nets = timed_networks(parser, given)
    console = Console(width=120)
    title = f"Steps of {BATCH} images of {given.size} pixels, seed {given.seed}, median of {given.rounds}"
    console.print(title, highlight=False)
    recording.print_environment(console)
    found: dict[str, dict[str, list[float]]] = {}
    for net in nets:
        ways = _ways(net, given.size, given.seed)
        for run in ways.values():
            run()  # the first costs more
        rounds = [{way: measuring.milliseconds(run) for way, run in ways.items()} for _ in range(given.rounds)]
        found[net] = {way: [one[way] for one in rounds] for way in ways}
    rows = [[net, *[f"{statistics.median(times):.0f}" for times in by_way.values()]] for net, by_way in found.items()]
    recording.print_table("Milliseconds per step", ("network", *next(iter(found.values()))), rows, console)
    if given.json:
        options = f"--size {given.size} --rounds {given.rounds} --seed {given.seed}"
        words = f"python benchmarks/whole_step.py --nets {given.nets} {options} --json {given.json}"
        recording.write(given.json, words, {"of": "the pass end to end", "size": given.size, "milliseconds": found})


def _ways(net: str, size: int, seed: int) -> dict[str, Callable[[], None]]:
    """A step of a network in every way."""
    torch.manual_seed(seed)
    module = torchvision.models.get_model(net, weights=None).eval().requires_grad_(False)
    images = torch.rand(BATCH, 3, size, size)
    settings = ReconstructionSettings()
    quantized = quantizing.quantized_graph(module, images, BITS, settings, FEWEST_IMAGES)
    plain = extract(quantized.graph_module, join(list(quantized.units)))
    set_mode(plain, Mode.STEPS)
    ours, last = with_gradients_from_outputs(plain), laid_out(images)

    def step(graph: fx.GraphModule, x: Tensor, together: int) -> Callable[[], None]:
        def run() -> None:
            graph.zero_grad(set_to_none=True)
            for some in x.split(together):
                end_to_end_loss(graph, some, settings.end_to_end_features).backward()

        return run

    return {
        "autograd": step(plain, images, FEWEST_IMAGES),
        "channels last": step(plain, last, FEWEST_IMAGES),
        "from outputs": step(ours, last, FEWEST_IMAGES),
        "ours": step(ours, last, images_at_once(ours, last, settings)),
    }


if __name__ == "__main__":
    main()
