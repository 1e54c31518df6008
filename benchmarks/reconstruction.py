"""Reconstruction methods side by side: same images, same steps per unit, one loop with other settings.

The images are real training images, so that their source does not blur the comparison; with --synthetic those of the default
synthesis, without any data.

Methods:
  nearest          rounding to nearest, ranges by Lp search
  AdaRound         layer by layer, or by the smallest parts that the graph can be cut into: a residual block is one of them
  BRECQ            block by block, squared error
  QDrop            block by block, quantization dropped at random
  MRECG ModCap     blocks joined by data-free capacity, quantization dropped at random
  MRECG loss       blocks joined by the loss of a base pass, whose steps come on top
  NAME+steps       one of these with the weights' step sizes learned too (Genie-M)
  ours             MRECG ModCap+steps from a second-order start, with corrected biases
  ours block       the same without joining
  ours loss        the same, joined by the loss of a base pass
  ours fixed       ours with the weights' step sizes as they are at the start
  ours end to end  ours, and behind it the pass end to end where the outputs are far off
  ours views       the same with views of small images, shifted and mirrored: the defaults
  ours 1 raised    ours with 8 bits for the unit that does the outputs the most harm, as a job's last trials raise it; also 2
                   and 4
  ours 1 by loss   the same for the unit with the largest relative loss in a pass of ours before, which comes on top
  QDrop twice      QDrop with twice the preset's steps, which take about the time of the defaults
  QDrop 20000      QDrop with the published number of steps, images per step and rate of the rounding, whatever the preset
All but ours begin at the nearest integers, leave biases alone and learn from all images to the end, as published. Besides
the accuracy: the largest loss of a unit, relative to the power of its output; the largest ratio of such losses from one unit to
the next, which is the oscillation that MRECG is about; wall seconds; the highest memory of the process while it reconstructs,
with model, torch, host and test images; and the error of the outputs on training images that calibrated nothing, in units of
their variance, by which methods can be chosen without labels. Test images give the accuracy and nothing else.

    python benchmarks/reconstruction.py --data DIR --json docs/figures/reconstruction-NAME.json && python benchmarks/tables.py
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from itertools import pairwise, product
from typing import Any
from unittest.mock import patch

import measuring
import quantizing
import recording
import subjects
from arguments import parse
from continuing import Earlier
from page import cell
from rich.console import Console
from torch import Tensor, nn

from inc_clusterq.adaptors import neural_compressor_algorithm
from inc_clusterq.adaptors.neural_compressor import NeuralCompressorAdaptor
from inc_clusterq.progress import Progress
from inc_clusterq.reconstruction.graph import Unit
from inc_clusterq.reconstruction.quantizers import QuantizedGraph
from inc_clusterq.reconstruction.reconstruct import Reconstruction, UnitReport, base_units
from inc_clusterq.reconstruction.sensitivity import can_be_raised
from inc_clusterq.reconstruction.settings import ReconstructionSettings

PUBLISHED: dict[str, Any] = {"start": "nearest", "correct_bias": False, "validation_share": 0, "learn_weight_scale": False}
LEARNED: dict[str, dict[str, Any]] = {
    "AdaRound": {**PUBLISHED, "granularity": "layer", "drop_probability": 0.0},
    "BRECQ": {**PUBLISHED, "granularity": "block", "drop_probability": 0.0},
    "QDrop": {**PUBLISHED, "granularity": "block"},
    "MRECG ModCap": {**PUBLISHED, "granularity": "modcap"},
    "MRECG loss": {**PUBLISHED, "granularity": "loss"},
}
RAISED = (1, 2, 4)  # units that get 8 bits
METHODS: dict[str, dict[str, Any]] = {
    "nearest": {**PUBLISHED, "granularity": "block", "iterations": 0},
    **LEARNED,
    **{f"{method}+steps": {**keys, "learn_weight_scale": True} for method, keys in LEARNED.items()},
    "ours": {"granularity": "modcap"},
    "ours block": {"granularity": "block"},
    "ours loss": {"granularity": "loss"},
    "ours fixed": {"granularity": "modcap", "learn_weight_scale": False},
    "ours end to end": {"granularity": "modcap", "end_to_end_iterations": None},
    "ours views": {"granularity": "modcap", "end_to_end_iterations": None, "views": None},
    **{f"ours {count} raised": {"granularity": "modcap", "fallback_units": count} for count in RAISED},
    **{f"ours {count} by loss": {"granularity": "modcap", "fallback_units": count, "by_loss": True} for count in RAISED},
    "QDrop twice": {**LEARNED["QDrop"], "iterations_times": 2},
    "QDrop 20000": {
        **LEARNED["QDrop"],
        "iterations": 20_000,
        "step_positions": 1_000_000,  # 32 images, whatever their size
        "weight_learning_rate": 1e-3,
        "activation_learning_rate": 1e-3,
        "rounding_weight": 0.01,
    },
}
DEFAULT = "nearest,AdaRound,BRECQ,QDrop,MRECG ModCap,MRECG loss,ours"
NO_SETTINGS = {"iterations_times", "fallback_units", "by_loss"}  # what a method has besides
MEASURES = ("top1", "output_error", "largest_loss", "largest_ratio", "seconds", "peak_mb")


def main() -> None:
    """Run every network, width, seed and method."""
    options = parse(
        __doc__,
        "resnet20,mobilenet_v1_025",
        "W4A4,W2A4",
        compared=DEFAULT,
        word="method",
        known=tuple(METHODS),
        synthetic="calibrate with images of the default synthesis",
        continues=True,
    )
    console = Console(width=140)
    kind = "synthetic" if options.synthetic else "real training"
    recording.print_head(f"Reconstruction with {options.images} {kind} images", options, console)
    earlier, figures = Earlier(options), dict[str, Any]()
    for net in options.nets:
        subject = subjects.load(options, net)
        training = None if options.synthetic else subject.training
        if not options.synthetic and (training is None or len(training) < options.images):
            console.print(f"{net}: there are not {options.images} training images for it; left out", highlight=False)
            continue
        exported = NeuralCompressorAdaptor().export(subject.model)
        widths = [f"W{weight}A{activation}" for weight, activation in options.widths]
        found: dict[str, dict[str, dict[str, list[float]]]] = {
            width: {method: {measure: [] for measure in MEASURES} for method in options.compared} for width in widths
        }
        plain = measuring.top1(subject.model.module, subject.test_inputs, subject.test_labels)
        splits = f"synthetic calibration images, {subject.test_split}" if options.synthetic else subject.splits
        figures[net] = {"float": plain, "splits": splits, "widths": found}
        for width, method in product(widths, options.compared):
            earlier.fill(found[width][method], "nets", net, "widths", width, method)
        recording.write_json(options, {"images": options.images, "nets": figures})  # where the earlier record has it all
        for position, seed in enumerate(options.seeds):
            images = subjects.synthetic(subject, options, seed) if training is None else subjects.real(training, options, seed)
            unseen = subjects.unseen(subject.training, options, seed)
            for width, method in product(widths, options.compared):
                if len(found[width][method]["top1"]) > position:
                    continue
                values = _measured(exported, images, width, METHODS[method], options.preset, seed, subject, unseen)
                for measure, value in values.items():
                    found[width][method][measure].append(value)
                line = ", ".join(f"{measure} {value:.4g}" for measure, value in values.items())
                console.print(f"  {net} seed {seed} {width} {method}: {line}", highlight=False)
                recording.write_json(options, {"images": options.images, "nets": figures})
        rows = [
            [width, method, *[cell(values[measure]) for measure in MEASURES]]
            for width, methods in found.items()
            for method, values in methods.items()
        ]
        recording.print_table(f"{net}, float {plain:.2f}", ("width", "method", *MEASURES), rows, console)


def _measured(
    exported: nn.Module,
    images: Tensor,
    width: str,
    keys: dict[str, Any],
    preset: str,
    seed: int,
    subject: subjects.Subject,
    unseen: Tensor | None,
) -> dict[str, float]:
    """One run: every one of MEASURES, but for the error of the outputs where there are no images for it."""
    measuring.forget_peak()
    began = time.perf_counter()
    request = (exported, images, int(width[1]), int(width[3]), _settings(preset, keys), seed)
    with ExitStack() as stack:
        if keys.get("by_loss"):
            reports = quantizing.one_trial(*request).reconstruction.units
            stack.enter_context(patch.object(neural_compressor_algorithm, "most_harmful", partial(_of_largest_loss, reports)))
        outcome = quantizing.one_trial(*request, fallback_units=keys.get("fallback_units", 0))
    seconds, peak = time.perf_counter() - began, measuring.memory_mb("VmHWM")
    accuracy = measuring.top1(outcome.model, subject.test_inputs, subject.test_labels)
    values = {"top1": accuracy}
    if unseen is not None:
        values["output_error"] = measuring.output_error(outcome.model, subject.model.module, unseen)
    largest_loss, largest_ratio = oscillation(outcome.reconstruction)
    return values | {"largest_loss": largest_loss, "largest_ratio": largest_ratio, "seconds": seconds, "peak_mb": peak}


def _of_largest_loss(
    reports: Sequence[UnitReport],
    quantized: QuantizedGraph,
    _: Tensor,
    settings: ReconstructionSettings,
    count: int,
    progress: Progress,
) -> list[Unit]:
    """What `most_harmful` would be by relative losses; a part of a joined unit has that of the whole."""
    losses = {layer: report.relative_loss for report in reports for layer in report.layers}
    candidates = [unit for unit in base_units(quantized, settings) if can_be_raised(unit, quantized, settings)]
    return sorted(candidates, key=lambda unit: -losses[unit.layers[0].name])[:count]


def oscillation(reconstruction: Reconstruction) -> tuple[float, float]:
    """Largest relative loss of a unit, and largest ratio of a unit's to that of the one before it.

    Units of 8 bits at the ends of the network are left out: next to them everything looks like a jump.
    """
    lowest = min(unit.lowest_bits for unit in reconstruction.units)
    losses = [unit.relative_loss for unit in reconstruction.units if unit.lowest_bits == lowest]
    return max(losses), max((after / before for before, after in pairwise(losses) if before > 0), default=1.0)


def _settings(preset: str, keys: dict[str, Any]) -> ReconstructionSettings:
    """Of a method, which sees every image as it is and ends with its last unit unless its keys say otherwise."""
    effort = ReconstructionSettings.PRESETS[preset]
    steps = {"iterations": effort["iterations"] * keys.get("iterations_times", 1)}
    own = {key: value for key, value in keys.items() if key not in NO_SETTINGS}
    plain = {"views": 1, "end_to_end_iterations": 0}
    return ReconstructionSettings.model_validate({**effort, **steps, **plain, **own})


if __name__ == "__main__":
    main()
