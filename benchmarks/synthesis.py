"""What the source of the calibration images is worth: the same reconstruction on images from each source, side by side.

Sources:
  noise               Gaussian noise
  statistics          pixels optimised on the BatchNorm statistics alone: no generator, no class, no alignment
  clusterq            the default synthesis
  generator           the same from what the generator paints
  leaves              the same from dead leaves, as is the default where the network knows photographs
  latent              a generator and latents per batch, without alignment
  latent+alignment    the same, aligned with the class centroids
  real                training images, where the data folder has any
  clusterq-TERM       the default without one of its parts: an ablation, on demand by --sources
Every source gives the same number of images, and everything downstream is equal: Neural Compressor's own static quantization
(INC W8A8) and ours at each width, without views of the images, so that none stands for more than one. Synthesis runs in a
process of its own, whose wall time and peak memory are recorded, and what of that memory model, torch and host took before it
began. The error of the outputs is that on training images that calibrated nothing, in units of their variance, by which
sources can be chosen without labels. Test images give the accuracy and nothing else.

    python benchmarks/synthesis.py --data DIR --nets resnet20 --widths W4A8,W4A4 --json docs/figures/synthesis-NAME.json
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import measuring
import quantizing
import recording
import subjects
import torch
from arguments import Options, parse
from continuing import Earlier
from making import COSTS, Made, make
from page import cell
from rich.console import Console
from torch import Tensor

from inc_clusterq.adaptors.neural_compressor import NeuralCompressorAdaptor
from inc_clusterq.synthesis.quality import measure_set
from inc_clusterq.synthesis.settings import ClusterQSettings

SYNTHETIC: dict[str, dict[str, Any]] = {
    "statistics": {
        "start": "generator",
        "iterations": 0,
        "refine_smoothness": 0,
        "classification_weight": 0,
        "alignment_weight": 0,
        "prior_weight": 0,
    },
    "clusterq": {},
    "generator": {"start": "generator"},
    "leaves": {"start": "leaves"},
    "latent": {"synthesizer": "latent", "alignment_weight": 0},
    "latent+alignment": {"synthesizer": "latent"},
    "clusterq-generator": {"start": "generator", "iterations": 0},
    "clusterq-waves": {"refine_smoothness": 0},
    "clusterq-refinement": {"refine_iterations": 0},
    "clusterq-classification": {"classification_weight": 0},
    "clusterq-alignment": {"alignment_weight": 0},
    "clusterq-diversity": {"mean_diversity": 0, "variance_diversity": 0},
    "clusterq-prior": {"prior_weight": 0},
    "clusterq-augmentation": {"augmentation": "none"},
    "latent-swing": {"synthesizer": "latent", "swing": False},
}
"""What each source changes of the preset."""

DEFAULT = "noise,statistics,clusterq,latent,latent+alignment,real"
HOST = "INC W8A8"
FIGURES = ("top1", "output_error")
MEASURES = ("statistics_distance", "implied_coverage", "implied_excess", "variation", "diversity")


def main() -> None:
    """Run every network, seed and source."""
    options = parse(
        __doc__,
        "resnet20",
        widths="W4A8,W4A4",
        compared=DEFAULT,
        word="source",
        known=("noise", "real", *SYNTHETIC),
        continues=True,
    )
    console = Console(width=140)
    recording.print_head(f"Sources of {options.images} calibration images", options, console)
    earlier, figures = Earlier(options), dict[str, Any]()
    for net in options.nets:
        subject = subjects.load(options, net)
        console.print(f"{net}: {subject.splits}", highlight=False)
        for found in _measured(net, subject, options, earlier, console):
            figures[net] = found
            recording.write_json(options, {"images": options.images, "synthesis": figures})
        columns = [*next(iter(found["sources"].values()))["top1"], "seconds", "peak MB"]
        rows = [[source, *_cells(entry)] for source, entry in found["sources"].items()]
        recording.print_table(f"{net}, float {found['float']:.2f}", ("source", *columns), rows, console)


def _cells(found: dict[str, Any]) -> list[str]:
    costs = [found["seconds"], found["peak_mb"]]
    return [cell(values) for values in [*found["top1"].values(), *costs]]


def _measured(
    net: str, subject: subjects.Subject, options: Options, earlier: Earlier, console: Console
) -> Iterator[dict[str, Any]]:
    """The figures of a network as they grow, after every model."""
    exported = NeuralCompressorAdaptor().export(subject.model)
    real = 0 if subject.training is None else len(subject.training)
    sources = [source for source in options.compared if source != "real" or real >= options.images]
    if sources != list(options.compared):
        console.print(f"  real is left out: {real} training images for {options.images}", highlight=False)
    columns = (HOST, *(f"W{weight}A{activation}" for weight, activation in options.widths))
    found: dict[str, dict[str, Any]] = {
        source: {figure: {column: [] for column in columns} for figure in FIGURES} | {key: [] for key in (*COSTS, "quality")}
        for source in sources
    }
    plain = measuring.top1(subject.model.module, subject.test_inputs, subject.test_labels)
    figures = {"float": plain, "splits": subject.splits, "sources": found}
    for source, entry in found.items():
        earlier.fill(entry, "synthesis", net, "sources", source)
    for position, seed in enumerate(options.seeds):
        unseen = subjects.unseen(subject.training, options, seed)
        for source, entry in found.items():
            top1 = entry["top1"]
            lacking = [column for column in columns if len(top1[column]) == position]
            if lacking:
                made = _images(source, subject, options, seed)
                if len(entry["quality"]) == position:
                    entry["quality"].append(_quality(subject, made))
                    for cost in COSTS if made.seconds is not None else ():
                        entry[cost].append(getattr(made, cost))
                for column in lacking:
                    model = _quantized(column, exported, made.inputs, seed, options)
                    top1[column].append(measuring.top1(model, subject.test_inputs, subject.test_labels))
                    if unseen is not None:
                        entry["output_error"][column].append(measuring.output_error(model, subject.model.module, unseen))
                    yield figures
                last = {column: round(values[position], 2) for column, values in top1.items()}
                errors = {column: round(values[position], 3) for column, values in entry["output_error"].items() if values}
                spent = f"{made.seconds:.0f} s, {made.peak_mb:.0f} MB" if made.seconds is not None else "-"
                console.print(f"  seed {seed} {source}: {last}; output error {errors}; synthesis {spent}", highlight=False)
    yield figures


def _quantized(column: str, exported: torch.nn.Module, images: Tensor, seed: int, options: Options) -> torch.nn.Module:
    """What calibration with these images leads to: in the host's own W8A8, or in ours at a width."""
    if column == HOST:
        return NeuralCompressorAdaptor().quantize_static(exported, images.split(quantizing.BATCH))
    weight, activation = int(column[1]), int(column[3])
    return quantizing.reconstructed(exported, images, weight, activation, seed, options, views=1)


def _images(source: str, subject: subjects.Subject, options: Options, seed: int) -> Made:
    """The images of one source; their labels are -1 where it has none."""
    nothing = torch.full((options.images,), -1)
    if source == "noise":
        generator = torch.Generator().manual_seed(seed)
        return Made(torch.randn(options.images, *subject.model.input.shape, generator=generator), nothing)
    if source == "real":
        assert subject.training is not None
        return Made(subjects.real(subject.training, options, seed), nothing)
    preset = ClusterQSettings.PRESETS[options.preset]
    settings = ClusterQSettings.model_validate({**preset, **SYNTHETIC[source]})
    return make(subject, settings, options.images, seed, options.data)


def _quality(subject: subjects.Subject, made: Made) -> dict[str, float | None]:
    """Means over the layers of what `inspect` measures without real inputs."""
    model = subject.model
    quality = measure_set(model.module, model.input, model.num_classes, made.inputs, made.labels)
    return {measure: quality.mean(measure) for measure in MEASURES} | {"recognised": quality.recognised}


if __name__ == "__main__":
    main()
