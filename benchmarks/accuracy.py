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

import common
import torch
from continuing import Earlier
from page import cell
from rich.console import Console

from inc_clusterq.adaptors.neural_compressor import NeuralCompressorAdaptor

NEAREST: dict[str, Any] = {"iterations": 0, "start": "nearest", "correct_bias": False, "views": 1}
OURS = "ours, no data"
COLUMNS = ("INC noise", "INC real", "nearest, real", "ours, real", OURS)


def main() -> None:
    """Run every network, width and seed."""
    options = common.parse(__doc__, "resnet20,mobilenet_v1_025,mcunet_320kb", continues=True)
    console = Console(width=140)
    common.print_head(f"Accuracy with {common.IMAGES} calibration images", options, console)
    earlier, figures = Earlier(options), dict[str, Any]()
    for net in options.nets:
        subject = common.subject(options, net)
        console.print(f"{net}: {subject.splits}", highlight=False)
        for found in _measured(net, subject, options, earlier, console):
            figures[net] = found
            common.write_json(options, {"images": common.IMAGES, "top1": figures})
        rows = [[width, *[cell(found[column]) for column in COLUMNS]] for width, found in figures[net]["top1"].items()]
        title = f"{net}, float {figures[net]['float']:.2f}"
        common.print_table(title, ("width", *COLUMNS), rows, console)


def _measured(
    net: str, subject: common.Subject, options: common.Options, earlier: Earlier, console: Console
) -> Iterator[dict[str, Any]]:
    """The figures of a network as they grow, after every width."""
    adaptor = NeuralCompressorAdaptor()
    exported = adaptor.export(subject.model)

    def score(model: torch.nn.Module) -> float:
        return common.top1(model, subject.test_inputs, subject.test_labels)

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
    for position, seed in enumerate(options.seeds):
        lacking = [pair for pair, width in zip(options.widths, widths, strict=True) if len(top1[width][OURS]) == position]
        if not lacking:
            continue
        began = time.perf_counter()
        synthetic = common.synthetic(subject, options, seed)
        synthesis = time.perf_counter() - began
        if len(seconds) == position:
            seconds.append(synthesis)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(synthetic.shape, generator=generator)
        real = None
        if subject.training is not None:
            real = subject.training[torch.randperm(len(subject.training), generator=generator)[: common.IMAGES]]
        for weight, activation in lacking:
            found = top1[width := f"W{weight}A{activation}"]
            if (weight, activation) == (8, 8):
                found["INC noise"].append(score(adaptor.quantize_static(exported, noise.split(common.BATCH))))
                if real is not None:
                    found["INC real"].append(score(adaptor.quantize_static(exported, real.split(common.BATCH))))
            if real is not None:
                nearest = common.reconstructed(exported, real, weight, activation, seed, options, **NEAREST)
                found["nearest, real"].append(score(nearest))
                found["ours, real"].append(score(common.reconstructed(exported, real, weight, activation, seed, options)))
            began = time.perf_counter()
            ours = common.reconstructed(exported, synthetic, weight, activation, seed, options, no_data=True)
            found[OURS].append(score(ours))
            spent = time.perf_counter() - began
            last = {column: round(values[-1], 2) for column, values in found.items() if values}
            console.print(f"  seed {seed} {width}: {last}; synthesis {synthesis:.0f} s, reconstruction {spent:.0f} s")
            yield figures


if __name__ == "__main__":
    main()
