"""What a deployed model is worth: latency, parity, accuracy and size of each target, next to the host's own int8.

Models:
  float           the float model, compiled by Inductor
  INC static      the host's own static quantization (8 bits), compiled by Inductor, by which its accuracy is taken too
  evaluated       the saved model as int8 kernels compute it, which is how this project scores models. All figures of
                  parity are against it
  eager           the same program as it stands, in float32 on dequantized values: what scoring it without care measures
  inductor, onnxruntime, openvino
                  ours, exported and loaded from disk; parity and accuracy come from a fresh process that sees the
                  exported folder and the images alone
On a processor without VNNI and AMX, whose 8-bit kernels overflow, our weights have 7 bits at most, as in a job by default;
the host has no such setting.

Quantization takes few reconstruction iterations on few images, since neither speed nor parity depends on them; the
accuracy column is there to compare the deployed model with the evaluated one, not to show what reconstruction can do. The
networks of torchvision have random weights, with BatchNorm statistics of random data: speed and parity, no accuracy.

    python benchmarks/deployment.py --data DIR --widths W8A8,W4A4 --seeds 0 --json docs/figures/deployment.json
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import recording
import subjects
import torch
from arguments import Options, parse
from deployment_table import EAGER, FLOAT, HEADINGS, OURS, STATIC, rows
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from inc_clusterq.adaptors.neural_compressor import NeuralCompressorAdaptor
from inc_clusterq.cpu import SAFE_WEIGHT_BITS, cpu, overflows
from inc_clusterq.deployment.arithmetic import kernel_arithmetic
from inc_clusterq.deployment.bench import Timing, compared, loaders
from inc_clusterq.deployment.export import export
from inc_clusterq.deployment.inductor import Compiled, compile_frozen, difference
from inc_clusterq.deployment.operators import fallbacks
from inc_clusterq.deployment.packing import pack
from inc_clusterq.deployment.targets import TARGETS
from inc_clusterq.fingerprint import fingerprint
from inc_clusterq.inputs import InputSpec
from inc_clusterq.models import FloatModel
from inc_clusterq.output import RESULT
from inc_clusterq.reconstruction.bits import FULL_BITS
from inc_clusterq.reconstruction.settings import ReconstructionSettings
from inc_clusterq.result import FORMAT
from inc_clusterq.tuning import Trial, TuningRequest

RANDOM = ("resnet18", "resnet50", "mobilenet_v2")  # of torchvision
CALIBRATION, ITERATIONS = 32, 20
PARITY_INPUTS, RANDOM_INPUTS = 1000, 100  # the evaluated model runs in eager mode, which is slow
BATCHES = (1, 32)
SCORED = 20  # images at once; all inputs are a multiple
WORKER = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from inc_clusterq.deployment.targets import TARGETS
inputs = load_file(sys.argv[3])["inputs"]
model = TARGETS[sys.argv[1]].load(Path(sys.argv[2]))
save_file({"logits": torch.cat([model(image) for image in inputs.split(1)])}, sys.argv[4])
"""


def main() -> None:
    """Run every network and width."""
    nets = ",".join((*RANDOM, "mcunet_320kb", "mobilenet_v1_025", "resnet20"))
    options = parse(__doc__, nets, "W8A8,W4A4", seeds="0", has_preset=False)
    if len(options.seeds) > 1:
        sys.exit(f"--seeds names {len(options.seeds)}; one is enough here, where nothing is averaged over seeds")
    console = Console(width=150)
    recording.print_head(f"Deployment, {torch.get_num_threads()} thread(s), {cpu()}", options, console)
    figures: dict[str, Any] = {}
    for net in options.nets:
        model, calibration, inputs, labels = _subject(options, net)
        for weight, activation in options.widths:
            title = f"{net} W{weight}A{activation}"
            with tempfile.TemporaryDirectory() as folder:
                figures[title] = _measure(
                    model, calibration, inputs, labels, (weight, activation), options.seeds[0], Path(folder)
                )
            recording.print_table(title, HEADINGS, rows(figures[title]), console)
            recording.write_json(options, {"threads": torch.get_num_threads(), "cpu": str(cpu()), "models": figures})


def _subject(options: Options, net: str) -> tuple[FloatModel, Tensor, Tensor, Tensor | None]:
    """The model, calibration images (noise where there are no training images), inputs for the parity, and their labels."""
    generator = torch.Generator().manual_seed(options.seeds[0])
    if net not in RANDOM:
        subject = subjects.load(options, net)
        calibration = torch.randn(CALIBRATION, *subject.model.input.shape, generator=generator)
        if subject.training is not None:
            calibration = subject.training[:CALIBRATION]
        return subject.model, calibration, subject.test_inputs[:PARITY_INPUTS], subject.test_labels[:PARITY_INPUTS]
    import torchvision

    torch.manual_seed(options.seeds[0])
    module = torchvision.models.get_model(net, weights=None)
    with torch.no_grad():
        module.train()
        for _ in range(3):
            module(torch.randn(8, 3, 224, 224, generator=generator))
    module = module.float().eval().requires_grad_(False)
    spec = InputSpec((3, 224, 224), -4.0, 4.0)
    model = FloatModel(net, module, spec, 1000, fingerprint(module, spec))
    images = torch.randn(CALIBRATION + RANDOM_INPUTS, 3, 224, 224, generator=generator).clamp(-4, 4)
    return model, images[:CALIBRATION], images[CALIBRATION:], None


def _measure(
    model: FloatModel,
    calibration: Tensor,
    inputs: Tensor,
    labels: Tensor | None,
    width: tuple[int, int],
    seed: int,
    folder: Path,
) -> dict[str, Any]:
    adaptor = NeuralCompressorAdaptor()
    exported = adaptor.export(model)
    ceiling = SAFE_WEIGHT_BITS if overflows(cpu()) else FULL_BITS
    settings = ReconstructionSettings(granularity="modcap", iterations=ITERATIONS, batch_size=8, weight_ceiling=ceiling)
    request = TuningRequest(*width, settings, max_trials=1, seed=seed)
    batches = calibration.split(8)
    outcome = adaptor.tune(exported, batches, [Trial("modcap", settings)], request, lambda module: 1.0, workspace=None)
    static = adaptor.quantize_static(exported, batches)
    result = folder / "result"
    result.mkdir()
    adaptor.save(outcome.model, calibration[:2], result)
    spec = asdict(model.input)
    described = {key: spec[key] for key in ("shape", "mean", "std")} | {"range": [spec["low"], spec["high"]]}
    (result / RESULT).write_text(json.dumps({"format": FORMAT, "config": {"model": {"input": described}}}))
    found: dict[str, Any] = {FLOAT: {}, STATIC: {}, **{name: {} for name in TARGETS}}
    for name in TARGETS:
        written = export(result, name, output=folder / name)
        fallen = fallbacks(written.operators)
        found[name]["operators"] = len([operator for operator in written.operators if operator.quantizable])
        found[name]["in_float"] = [f"{operator.name}: {operator.kernel}" for operator in fallen]
        found[name]["size"] = sum(written.sizes.values())
    packed = pack(result)
    found["sizes"] = {"float32": packed.float_size, "plain": packed.plain_size, "packed": packed.packed_size}
    expected = _logits(kernel_arithmetic(outcome.model), inputs)
    eager = _logits(outcome.model, inputs)
    found[OURS] = {"top1": _top1(expected, labels)}
    found[EAGER] = {"top1": _top1(eager, labels), **asdict(difference(eager, expected))}
    found[FLOAT]["top1"] = _top1(_logits(model.module, inputs), labels)
    found[STATIC]["top1"] = _top1(_logits(compile_frozen(static, inputs[:SCORED]), inputs), labels)
    save_file({"inputs": inputs.contiguous()}, folder / "inputs.safetensors")
    for name in TARGETS:
        arguments = [name, str(folder / name), str(folder / "inputs.safetensors"), str(folder / "logits.safetensors")]
        subprocess.run([sys.executable, "-W", "ignore", "-c", WORKER, *arguments], check=True, stderr=subprocess.DEVNULL)
        logits = load_file(folder / "logits.safetensors")["logits"]
        found[name] |= {"top1": _top1(logits, labels), **asdict(difference(logits, expected))}
    for batch in BATCHES:
        for timing in _timings(model.module, static, folder, inputs[:batch].clone()):
            found[timing.model][f"batch {batch}"] = asdict(timing)
    return found


def _timings(model: nn.Module, static: nn.Module, folder: Path, inputs: Tensor) -> list[Timing]:
    torch.compiler.reset()
    models: dict[str, Compiled] = {FLOAT: compile_frozen(model, inputs), STATIC: compile_frozen(static, inputs)}
    for name, load in loaders(torch.get_num_threads()).items():
        models[name] = load(folder / name)
        models[name](inputs)
    return compared(models, inputs)


@torch.no_grad()
def _logits(model: Compiled, inputs: Tensor) -> Tensor:
    return torch.cat([model(images) for images in inputs.split(SCORED)])


def _top1(logits: Tensor, labels: Tensor | None) -> float | None:
    return None if labels is None else 100 * float((logits.argmax(1) == labels).double().mean())


if __name__ == "__main__":
    main()
