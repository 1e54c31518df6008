"""Synthesis in a fresh process of its own, so that its time and its peak memory are those of nothing else."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import measuring
import subjects
from safetensors.torch import load_file, save_file
from torch import Tensor

from inc_clusterq.inputs import InputSpec
from inc_clusterq.synthesis.clusterq import synthesise
from inc_clusterq.synthesis.settings import ClusterQSettings

COSTS = ("seconds", "peak_mb", "start_mb")


@dataclass(frozen=True)
class Made:
    """A set with what it cost; None for images that cost nothing."""

    inputs: Tensor
    labels: Tensor
    seconds: float | None = None
    peak_mb: float | None = None
    start_mb: float | None = None  # what model, torch and host took of it before the synthesis began


def make(subject: subjects.Subject, settings: ClusterQSettings, images: int, seed: int, data: Path) -> Made:
    """The set of a network of the data folder."""
    model = subject.model
    with tempfile.TemporaryDirectory() as folder, _alone() as process:
        file = Path(folder) / "set.safetensors"
        job = process.submit(_synthesise, data, model.name, model.input, model.num_classes, settings, images, seed, file)
        costs = job.result()
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    return Made(tensors["inputs"], tensors["labels"], *costs)


def _alone() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_end_with_parent)


def _end_with_parent() -> None:
    """Do not go on for minutes when the benchmark is killed."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _synthesise(
    data: Path, net: str, spec: InputSpec, num_classes: int, settings: ClusterQSettings, images: int, seed: int, file: Path
) -> tuple[float, float, float]:
    """Write the set to `file`; returns COSTS."""
    module = subjects.load_module(data).model(net)[0].float().eval().requires_grad_(False)
    start, began = measuring.memory_mb("VmRSS"), time.perf_counter()
    inputs, labels = synthesise(module, spec, settings, num_classes=num_classes, samples=images, seed=seed)
    seconds = time.perf_counter() - began
    save_file({"inputs": inputs.contiguous(), "labels": labels.contiguous()}, file)
    return seconds, measuring.memory_mb("VmHWM"), start
