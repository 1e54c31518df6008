"""What all benchmark scripts share: the command line, networks and images from a data folder, the printed head, the table.

The data folder holds a `load.py` with MODELS, model(name), cifar(split), imagenet(name, size), kws() and
top1(net, x, y, norm); nothing else of the folder is relied on. Test images are for the final figure only: whatever a
method sees comes from the training split, or from no image at all.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from neural_compressor.torch.algorithms.pt2e_quant.core import W8A8PT2EQuantizer
from neural_compressor.torch.export import export
from neural_compressor.torch.quantization import INT8StaticQuantConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from inc_clusterq.adaptors.neural_compressor import NeuralCompressorAdaptor
from inc_clusterq.deployment.arithmetic import kernel_arithmetic
from inc_clusterq.environment import environment
from inc_clusterq.fingerprint import fingerprint
from inc_clusterq.inputs import InputSpec
from inc_clusterq.models import FloatModel, check_logits
from inc_clusterq.reconstruction.bits import BitPlan
from inc_clusterq.reconstruction.quantizers import QuantizedGraph, initialise_activations, install_quantizers
from inc_clusterq.reconstruction.settings import ReconstructionSettings
from inc_clusterq.synthesis.clusterq import synthesise
from inc_clusterq.synthesis.settings import ClusterQSettings
from inc_clusterq.synthesis.store import cached_dataset
from inc_clusterq.tuning import Trial, TuningOutcome, TuningRequest

TRAINING_IMAGES = {"cifar": "train_first2048", "imagenet": "train500"}
TEST_IMAGES = {"cifar": "test_first5000", "imagenet": "val1300"}


IMAGES = 256  # that calibrate
UNSEEN = 512  # training images at most that judge outputs
BATCH = 32  # images per calibration call, the default of the YAML


@dataclass(frozen=True)
class Options:
    """The common command line."""

    data: Path
    nets: tuple[str, ...]
    widths: tuple[tuple[int, int], ...]
    seeds: tuple[int, ...]
    limit: int | None
    preset: str
    json: Path | None
    images: int = IMAGES
    compared: tuple[str, ...] = ()  # sources of the calibration images, or methods, where a script compares such
    word: str = ""  # for one of them
    workspace: Path | None = None  # where synthetic sets are kept
    continued: bool = False  # keep what the record has
    synthetic: bool = False  # calibrate methods with no real image


@dataclass(frozen=True)
class Subject:
    """A network with the images that belong to it; all images are normalised as the network takes them."""

    model: FloatModel
    training: Tensor | None  # None: the folder has no training images for this network
    test_inputs: Tensor
    test_labels: Tensor
    training_split: str  # what is taken from where, in words
    test_split: str

    @property
    def splits(self) -> str:
        """Which images are used for what, where real ones calibrate."""
        return f"{self.training_split}, {self.test_split}" if self.training is not None else self.test_split


def parse(
    description: str | None,
    nets: str,
    widths: str | None = "W8A8,W4A8",
    seeds: str = "0,1,2",
    compared: str = "",
    word: str = "",
    known: Sequence[str] = (),
    synthetic: str = "",
    continues: bool = False,
    has_preset: bool = True,
) -> Options:
    """Read the command line; exits with status 2 and a sentence where it is wrong.

    A script that compares sources of images, methods or presets names the default ones in `compared`, what one is called in
    `word` and all of them in `known`; one without `widths` quantizes nothing. One that takes synthetic images in place of real
    ones on demand says so in `synthetic`; one that `continues` a record takes `--continue`.
    One that compares presets, or whose effort is its own, has none (`has_preset`).
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("INCQ_DATA"), help="data folder (or INCQ_DATA)")
    parser.add_argument("--nets", default=nets, help=f"networks, separated by commas (default {nets})")
    if widths:
        parser.add_argument("--widths", default=widths, help=f"bit-widths such as W4A8 (default {widths})")
    parser.add_argument("--seeds", default=seeds, help=f"seeds (default {seeds})")
    parser.add_argument("--limit", type=int, help="test images at most (default: all)")
    if has_preset:
        parser.add_argument("--preset", choices=("fast", "balanced", "best"), default="balanced", help="default balanced")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--workspace", type=Path, help="folder that keeps synthetic sets, so that another run finds them")
    if compared:
        parser.add_argument(f"--{word}s", default=compared, help=f"of {', '.join(known)} (default {compared})")
        parser.add_argument("--images", type=int, default=IMAGES, help=f"calibration images (default {IMAGES})")
    if continues:
        parser.add_argument(
            "--continue",
            dest="continued",
            action="store_true",
            help="measure what the file of --json lacks; it must be of this version, which nothing checks, and what is in it "
            "but not asked for goes",
        )
    if synthetic:
        parser.add_argument("--synthetic", action="store_true", help=synthetic)
    given = parser.parse_args()
    if given.data is None or not (Path(given.data) / "load.py").is_file():
        parser.error(f"--data must name a folder that holds load.py; it is {given.data}")
    try:
        pairs = tuple((int(width[1]), int(width[3])) for width in _listed(given, "widths") if _is_width(width))
        numbers = tuple(int(seed) for seed in given.seeds.split(","))
    except ValueError as error:
        parser.error(str(error))
    chosen = _listed(given, f"{word}s")
    if unknown := [name for name in chosen if name not in known]:
        parser.error(f"{unknown[0]!r} is not a {word}; there are {', '.join(known)}")
    images = given.images if compared else IMAGES
    if images < 1:
        parser.error(f"--images is {images}; it must be at least 1")
    return Options(
        data=Path(given.data),
        nets=tuple(given.nets.split(",")),
        widths=pairs,
        seeds=numbers,
        limit=given.limit,
        preset=getattr(given, "preset", ""),
        json=given.json,
        images=images,
        compared=chosen,
        word=word,
        workspace=given.workspace,
        continued=continues and given.continued,
        synthetic=bool(synthetic) and given.synthetic,
    )


def _listed(given: argparse.Namespace, name: str) -> tuple[str, ...]:
    """What an argument that a script may lack names, separated by commas."""
    return tuple(getattr(given, name).split(",")) if name in given else ()


def _is_width(text: str) -> bool:
    if len(text) == 4 and text[0] == "W" and text[2] == "A" and text[1] in "2345678" and text[3] in "2345678":
        return True
    raise ValueError(f"{text!r} is not a width; W4A8 is, with 2 to 8 bits each")


def subject(options: Options, net: str) -> Subject:
    """Load a network and its images."""
    load = load_module(options.data)
    if net not in load.MODELS:
        sys.exit(f"{options.data / 'load.py'} has no network {net!r}; it has {', '.join(load.MODELS)}")
    module, normalise, size = load.model(net)
    if size is None:
        kind, training, (test, labels) = "kws", None, load.kws()
    elif size == 32:
        kind, training, (test, labels) = "cifar", load.cifar(TRAINING_IMAGES["cifar"])[0], load.cifar(TEST_IMAGES["cifar"])
    else:
        kind, training = "imagenet", load.imagenet(TRAINING_IMAGES["imagenet"], size)[0]
        test, labels = load.imagenet(TEST_IMAGES["imagenet"], size)
    test, labels = test[: options.limit], labels[: options.limit]
    spec = input_spec(normalise, test, is_image=size is not None)
    module = module.float().eval().requires_grad_(False)
    model = FloatModel(net, module, spec, check_logits(module, spec), fingerprint(module, spec))
    if kind == "kws":
        training_split, test_split = "", f"scored on {len(labels)} keyword recordings; there are no training recordings"
    else:
        training_split = f"real calibration images from {TRAINING_IMAGES[kind]}"
        test_split = f"scored on {len(labels)} images of {TEST_IMAGES[kind]}"
    real = None if training is None else normalise(training.float())
    return Subject(model, real, normalise(test.float()), labels, training_split, test_split)


def input_spec(normalise: Callable[[Tensor], Tensor], like: Tensor, *, is_image: bool) -> InputSpec:
    """Range and normalisation as the network's owner would state them.

    Images are bytes, and `normalise` is affine per channel, so two of its values give mean and deviation. Features that
    are not images have the range of their own file format, taken here as the extremes of what the file holds.
    """
    shape = tuple(like.shape[1:])
    if not is_image:
        return InputSpec(shape, float(like.min()), float(like.max()))
    black, white = (normalise(torch.full((1, shape[0], 1, 1), value)).flatten() for value in (0.0, 255.0))
    std = 255.0 / (white - black)
    mean = -black * std
    return InputSpec(shape, 0.0, 255.0, tuple(mean.tolist()), tuple(std.tolist()))


def top1(model: nn.Module, inputs: Tensor, labels: Tensor, batch: int = 50) -> float:
    """Percentage of labels predicted; quantized models compute as the int8 kernels do."""
    deployed = kernel_arithmetic(model)
    with torch.no_grad():
        pairs = zip(inputs.split(batch), labels.split(batch), strict=True)
        return 100 * sum(int((deployed(x).argmax(1) == y).sum()) for x, y in pairs) / len(labels)


def output_error(model: nn.Module, plain: nn.Module, inputs: Tensor, batch: int = 50) -> float:
    """Mean squared distance of a quantized model's outputs from the float one's, in units of the variance of the latter.

    Needs no label, and tells apart what the accuracy of a few thousand images does not.
    """
    deployed = kernel_arithmetic(model)
    with torch.no_grad():
        wanted = torch.cat([plain(x) for x in inputs.split(batch)])
        given = torch.cat([deployed(x) for x in inputs.split(batch)])
    return float((given - wanted).square().mean() / wanted.var(0, correction=0).mean())


def real(training: Tensor, options: Options, seed: int) -> Tensor:
    """As many training images as were asked for, drawn with the seed."""
    return training[_drawn(training, seed)[: options.images]]


def unseen(training: Tensor | None, options: Options, seed: int) -> Tensor | None:
    """Training images that `real` leaves, at most UNSEEN; None where there are none."""
    if training is None or len(training) <= options.images:
        return None
    return training[_drawn(training, seed)[options.images :][:UNSEEN]]


def _drawn(training: Tensor, seed: int) -> Tensor:
    return torch.randperm(len(training), generator=torch.Generator().manual_seed(seed))


def synthetic(subject: Subject, options: Options, seed: int) -> Tensor:
    """The default synthesis at the preset's effort; with a workspace, a set that lies there is taken from it."""
    model, settings = subject.model, ClusterQSettings.model_validate(ClusterQSettings.PRESETS[options.preset])
    wanted: dict[str, Any] = {"num_classes": model.num_classes, "samples": options.images, "seed": seed}
    if options.workspace is None:
        return synthesise(model.module, model.input, settings, **wanted)[0]
    return cached_dataset(options.workspace, model.module, model.fingerprint, model.input, settings, **wanted).inputs


def reconstructed(
    exported: nn.Module,
    images: Tensor,
    weight: int,
    activation: int,
    seed: int,
    options: Options,
    **keys: Any,
) -> nn.Module:
    """Ours, in one trial, so that nothing is selected: ModCap granularity at the preset's effort, with `keys` changed."""
    preset = ReconstructionSettings.PRESETS[options.preset]
    settings = ReconstructionSettings.model_validate({**preset, "granularity": "modcap", **keys})
    return one_trial(exported, images, weight, activation, settings, seed).model


def one_trial(
    exported: nn.Module,
    images: Tensor,
    weight: int,
    activation: int,
    settings: ReconstructionSettings,
    seed: int,
    workspace: Path | None = None,
) -> TuningOutcome:
    """A reconstruction through the host's own loop, scored by nothing."""
    request = TuningRequest(weight, activation, settings, max_trials=1, seed=seed)
    trials = [Trial(settings.granularity or "", settings)]
    adaptor = NeuralCompressorAdaptor()
    return adaptor.tune(exported, images.split(BATCH), trials, request, score=lambda model: 1.0, workspace=workspace)


def quantized_graph(
    module: nn.Module, images: Tensor, bits: int, settings: ReconstructionSettings, batch: int
) -> QuantizedGraph:
    """A module that is no network of the data folder with learnable quantizers, set from what it does with `images`."""
    exported = export(module, (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=len(images))},))
    prepared = W8A8PT2EQuantizer(quant_config=INT8StaticQuantConfig()).prepare(exported)
    quantized = install_quantizers(prepared, BitPlan(bits, bits), settings)
    initialise_activations(quantized, images, batch)
    return quantized


def timing_parser(description: str | None, nets: str) -> argparse.ArgumentParser:
    """The command line of a script that times networks of torchvision, by default `nets`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", default=nets, help=f"of torchvision (default {nets})")
    parser.add_argument("--size", type=int, default=224, help="pixels of a side (default 224)")
    parser.add_argument("--rounds", type=int, default=5, help="of which the median is taken (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser


def timed_networks(parser: argparse.ArgumentParser, given: argparse.Namespace) -> list[str]:
    """Those of `--nets`; exits with status 2 and a sentence where torchvision has one not."""
    nets: list[str] = given.nets.split(",")
    if unknown := set(nets) - set(torchvision.models.list_models()):
        parser.error(f"torchvision has no network {unknown.pop()!r}")
    return nets


def milliseconds(run: Callable[[], None]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - began)


def forget_peak() -> None:
    """Let the highest memory of this process, `VmHWM`, begin anew at what it uses now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def memory_mb(key: str) -> float:
    """`VmRSS` or `VmHWM` of this process in MB; its `ru_maxrss` would count what the parent used before it began."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return int(status[key].split()[0]) / 1024


def print_head(title: str, options: Options, console: Console) -> None:
    """Seeds, machine and versions: what the figures below depend on."""
    preset = f"preset {options.preset}, " if options.preset else ""
    console.print(f"{title}: {preset}seeds {', '.join(map(str, options.seeds))}", highlight=False)
    print_environment(console)


def print_environment(console: Console) -> None:
    """Machine and versions."""
    pairs = environment(NeuralCompressorAdaptor().versions()).items()
    console.print(", ".join(f"{name} {value}" for name, value in pairs), highlight=False, soft_wrap=True)


def command(options: Options) -> str:
    """The call that repeats these figures, without paths of this machine."""
    widths = ",".join(f"W{weight}A{activation}" for weight, activation in options.widths)
    words = [
        f"python benchmarks/{Path(sys.argv[0]).name} --data DIR --nets {','.join(options.nets)}",
        f"--widths {widths}" if widths else "",
        f"--seeds {','.join(map(str, options.seeds))}",
        f"--preset {options.preset}" if options.preset else "",
        f"--limit {options.limit}" if options.limit else "",
        f"--{options.word}s {shlex.quote(','.join(options.compared))} --images {options.images}" if options.compared else "",
        "--synthetic" if options.synthetic else "",
        f"--json {options.json}" if options.json else "",
    ]
    return " ".join(word for word in words if word)


def print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], console: Console) -> None:
    """One table; the first column is left-aligned."""
    table = Table(title=title, title_justify="left")
    for position, heading in enumerate(headings):
        table.add_column(heading, justify="left" if position == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def write_json(options: Options, figures: dict[str, Any]) -> None:
    """All single figures with what they depend on."""
    if options.json is None:
        return
    given = {key: value for key, value in (("preset", options.preset), ("limit", options.limit)) if value}
    record(options.json, command(options), {**given, "seeds": options.seeds, **figures})


def record(file: Path, command: str, figures: dict[str, Any]) -> None:
    """Write figures, the call that repeats them, and machine and versions."""
    head = {"command": command, "environment": environment(NeuralCompressorAdaptor().versions())}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**head, **figures}, indent=2) + "\n", encoding="utf-8")


def load_module(folder: Path) -> Any:
    """The data folder's `load.py`."""
    spec = importlib.util.spec_from_file_location("load", folder / "load.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
