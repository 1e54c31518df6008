"""`inc-clusterq bench`: how fast a result is on each target, against the compiled float model.

The models take turns, call by call, so that a drift of the machine's speed meets all of them, and the ratio to float is
the median of the ratios of neighbouring calls. Every run time gets the same number of threads.
"""

from __future__ import annotations

import logging
import resource
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from torch import Tensor

from inc_clusterq.config import Config, load_config
from inc_clusterq.cpu import Cpu, cpu, range_warning
from inc_clusterq.deployment import onnx, openvino
from inc_clusterq.deployment.export import parity_inputs
from inc_clusterq.deployment.inductor import Compiled, compile_frozen
from inc_clusterq.deployment.latency import Latency, milliseconds_in_turn
from inc_clusterq.deployment.packing import weight_bits
from inc_clusterq.deployment.saved import SavedModel, open_result
from inc_clusterq.deployment.targets import load_inductor, target
from inc_clusterq.errors import ConfigError, ResultError
from inc_clusterq.inputs import MOST_PER_BATCH
from inc_clusterq.models import load_model
from inc_clusterq.progress import SILENT, Progress
from inc_clusterq.result import place

logger = logging.getLogger(__name__)

FLOAT = "float"


@dataclass(frozen=True)
class Timing:
    """One model at one batch size."""

    model: str
    batch: int
    latency: Latency
    speed: Latency  # times as fast as the float model, from neighbouring calls


@dataclass(frozen=True)
class Bench:
    """What was measured."""

    timings: tuple[Timing, ...]
    threads: int
    processor: Cpu
    warning: str | None
    peak_memory: int  # bytes, of this process so far

    def print(self, console: Console) -> None:
        """Print the table and what it was measured on."""
        table = Table(title=f"Latency, {self.threads} thread(s), models in turn", title_justify="left")
        table.add_column("model")
        for heading in ("batch", "ms", "10 to 90 %", "speed", "10 to 90 %"):
            table.add_column(heading, justify="right")
        for timing in self.timings:
            latency, speed = timing.latency, timing.speed
            table.add_row(
                timing.model,
                str(timing.batch),
                f"{latency.median:.2f}",
                f"{latency.low:.2f} to {latency.high:.2f}",
                f"{speed.median:.2f}x",
                f"{speed.low:.2f} to {speed.high:.2f}",
            )
        console.print(table)
        console.print(str(self.processor), soft_wrap=True, highlight=False)
        console.print(f"Peak memory of the process: {self.peak_memory / 2**20:.0f} MiB", highlight=False)
        if self.warning:
            console.print(f"Warning: {self.warning}.", soft_wrap=True, highlight=False)


def numbers(text: str) -> tuple[int, ...]:
    """Batch sizes from `1,32`; ConfigError where it is something else."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = (0,)
    if not all(1 <= number <= MOST_PER_BATCH for number in found):
        raise ConfigError(
            f"batch sizes are {text!r}; they must be whole numbers from 1 to {MOST_PER_BATCH} with commas between, such as 1,32"
        )
    return found


def bench(
    result: Path,
    batches: Sequence[int] = (1, 32),
    targets: Sequence[str] = ("inductor",),
    *,
    threads: int | None = None,
    config_file: Path | None = None,
    progress: Progress = SILENT,
) -> Bench:
    """Time a saved result on `targets`.

    Raises:
        ResultError: the result is missing, damaged, of another version, of another place, or of another network.
        ModelError: the float model cannot be loaded from where it was.
        MissingDependencyError: a run time is not installed.
    """
    chosen = [target(name) for name in dict.fromkeys(targets)]
    saved = open_result(result)
    config = load_config(config_file) if config_file else _config(saved)
    if (shape := config.model.input.spec().shape) != saved.shape:
        raise ResultError(
            f"result {result} takes inputs of shape {list(saved.shape)}, and those of {config_file or 'its YAML'} have "
            f"{list(shape)}: name the YAML that it was made from with --config"
        )
    model = load_model(config.model)
    if saved.report.get("fingerprint", model.fingerprint) != model.fingerprint:
        logger.warning("The float model %s is not the one that was quantized: its code or its weights are others", model.name)
    processor = cpu()
    images = parity_inputs(saved, max(batches))
    timings: list[Timing] = []
    stages = len(batches) * (len(chosen) + 1)
    with tempfile.TemporaryDirectory() as scratch, _threads(threads) as count, progress.stage("Timing", stages) as stage:
        folders = {}
        for each in chosen:
            folders[each.name] = Path(scratch) / each.name
            folders[each.name].mkdir()
            each.write(saved, folders[each.name])
        for batch in batches:
            inputs = images[:batch].clone()
            torch.compiler.reset()  # before all, not between: a model that lost its code would be compiled again, thawed
            models: dict[str, Compiled] = {FLOAT: compile_frozen(model.module, inputs)}
            for name, folder in folders.items():
                models[name] = loaders(count)[name](folder)
                models[name](inputs)
                stage.advance(1, f"prepared {name}")
            timings += compared(models, inputs)
            stage.advance(1, f"timed batch {batch}")
    warning = range_warning(processor, list(weight_bits(saved.program).values()))
    return Bench(tuple(timings), count, processor, warning, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def loaders(threads: int) -> Mapping[str, Callable[[Path], Compiled]]:
    """How to load what each target has written, with a number of threads."""
    return {
        "inductor": load_inductor,
        "onnxruntime": lambda folder: onnx.load(folder, threads),
        "openvino": lambda folder: openvino.load(folder, threads),
    }


def compared(
    models: Mapping[str, Compiled],
    inputs: Tensor,  # shape: (batch, *shape)
) -> list[Timing]:
    """Time the models in turn; the first one is what the others are compared with."""
    times = milliseconds_in_turn(models, inputs)
    reference = next(iter(times.values()))
    return [
        Timing(
            name,
            len(inputs),
            Latency.of(values),
            Latency.of([base / value for base, value in zip(reference, values, strict=True)]),
        )
        for name, values in times.items()
    ]


def _config(saved: SavedModel) -> Config:
    """The job that made the result, its files found relative to where the result lies."""
    folder = (saved.folder / str(saved.report.get("folder", "."))).resolve()
    if folder.is_relative_to(saved.folder.resolve()):
        raise ResultError(
            f"result {saved.folder} names {folder} as the folder of the model's code, which lies in the result itself, and "
            "none of its own code is run: name the job's YAML with --config"
        )
    if saved.report.get("place") != place(folder):
        raise ResultError(
            f"result {saved.folder} has been moved since it was made, and {folder} is another folder than that of the model's "
            "code: name the job's YAML with --config"
        )
    try:
        return Config.model_validate(dict(saved.report["config"]), context={"folder": folder})
    except (KeyError, ValidationError) as error:
        raise ResultError(
            f"result {saved.folder} does not say what made it: {' '.join(str(error).split())[:200]}; "
            "name the job's YAML with --config"
        ) from error


@contextmanager
def _threads(wanted: int | None) -> Iterator[int]:
    """torch's threads set to `wanted`, and back again."""
    before = torch.get_num_threads()
    if wanted is not None:
        torch.set_num_threads(wanted)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
