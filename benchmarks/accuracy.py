"""Top-1 accuracy of real networks: float, the host's static quantization, and ours without data, side by side.

Columns:
  INC noise, INC real    the host's own static quantization with its defaults, calibrated with Gaussian noise or with
                         real training images; it has 8-bit convolution weights only
  nearest, real          rounding to nearest at the stated width, ranges by Lp search on real training images
  ours, real             MRECG reconstruction on the same real training images
  ours, no data          MRECG reconstruction on ClusterQ images, as a job does it: no real image is seen
Every method gets the same number of images. Test images give the figures and nothing else: no selection, no early stop.

    python benchmarks/accuracy.py --data DIR --json docs/figures/accuracy-NAME.json && python benchmarks/tables.py
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import measuring
import quantizing
import recording
import subjects
import torch
from arguments import IMAGES, Options, parse
from continuing import Earlier
from page import cell
from rich.console import Console

from inc_clusterq.adaptors.neural_compressor import NeuralCompressorAdaptor

NEAREST: dict[str, Any] = {"iterations": 0, "start": "nearest", "correct_bias": False, "views": 1}
NOISE, OURS = "INC noise", "ours, no data"
REAL = ("INC real", "nearest, real", "ours, real")
COLUMNS = (NOISE, *REAL, OURS)


def main() -> None:
    """Run every network, width and seed."""
    options = parse(__doc__, "resnet20,mobilenet_v1_025,mcunet_320kb", continues=True)
    console = Console(width=140)
    recording.print_head(f"Accuracy with {IMAGES} calibration images", options, console)
    earlier, figures = Earlier(options), dict[str, Any]()
    for net in options.nets:
        subject = subjects.load(options, net)
        console.print(f"{net}: {subject.splits}", highlight=False)
        for found in _measured(net, subject, options, earlier, console):
            figures[net] = found
            recording.write_json(options, {"images": IMAGES, "top1": figures})
        rows = [[width, *[cell(found[column]) for column in COLUMNS]] for width, found in figures[net]["top1"].items()]
        title = f"{net}, float {figures[net]['float']:.2f}"
        recording.print_table(title, ("width", *COLUMNS), rows, console)


def _measured(
    net: str, subject: subjects.Subject, options: Options, earlier: Earlier, console: Console
) -> Iterator[dict[str, Any]]:
    """The figures of a network as they grow, model by model."""
    adaptor = NeuralCompressorAdaptor()
    exported = adaptor.export(subject.model)

    def score(model: torch.nn.Module) -> float:
        return measuring.top1(model, subject.test_inputs, subject.test_labels)

    widths = [f"W{weight}A{activation}" for weight, activation in options.widths]
    top1: dict[str, dict[str, list[float]]] = {width: {column: [] for column in COLUMNS} for width in widths}
    seconds: list[float] = []
    figures = {
        "float": score(subject.model.module),
        "splits": subject.splits,
        "top1": top1,
        **({} if options.workspace else {"synthesis_seconds": seconds}),  # a set that was found took none
    }
    earlier.fill({"top1": top1, "synthesis_seconds": seconds}, "top1", net)
    yield figures

    def lacks(width: str, column: str, position: int) -> bool:
        measurable = column not in REAL or subject.training is not None
        return measurable and (width == "W8A8" or not column.startswith("INC")) and len(top1[width][column]) == position

    for position, seed in enumerate(options.seeds):
        lacking = [(width, column) for width in widths for column in COLUMNS if lacks(width, column, position)]
        if not lacking:
            continue
        generator = torch.Generator().manual_seed(seed)
        images = {NOISE: torch.randn(IMAGES, *subject.model.input.shape, generator=generator)}
        if subject.training is not None:
            real = subject.training[torch.randperm(len(subject.training), generator=generator)[:IMAGES]]
            images |= dict.fromkeys(REAL, real)
        if any(column == OURS for _, column in lacking):
            began = time.perf_counter()
            images[OURS] = subjects.synthetic(subject, options, seed)
            if len(seconds) == position:
                seconds.append(time.perf_counter() - began)
        for width, column in lacking:
            began, inputs = time.perf_counter(), images[column]
            if column.startswith("INC"):
                model = adaptor.quantize_static(exported, inputs.split(quantizing.BATCH))
            else:
                keys = NEAREST if column == "nearest, real" else {}
                bits = int(width[1]), int(width[3])
                model = quantizing.reconstructed(exported, inputs, *bits, seed, options, **keys)
            top1[width][column].append(score(model))
            spent = time.perf_counter() - began
            console.print(f"  seed {seed} {width} {column}: {top1[width][column][-1]:.2f} in {spent:.0f} s", highlight=False)
            yield figures


if __name__ == "__main__":
    main()
