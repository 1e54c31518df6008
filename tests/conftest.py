from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from networks import NETWORKS, SIZES
from torch import Tensor, fx, nn

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure() -> None:
    """Workers that run side by side share the processors, and so do the processes that they start."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if workers > 1:
        threads = max(1, len(os.sched_getaffinity(0)) // workers)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)


@pytest.fixture
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture
def write_module(tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """Write a user's module into `tmp_path` under a name that no other test uses, and forget it afterwards."""
    written: list[str] = []

    def write(source: str) -> str:
        name = f"user_{uuid.uuid4().hex}"
        (tmp_path / f"{name}.py").write_text(dedent(source))
        written.append(name)
        return name

    yield write
    for name in written:
        sys.modules.pop(name, None)


Network = tuple[nn.Module, Tensor]


@pytest.fixture
def network() -> Callable[[str], Network]:
    """A small network by name, one for each kind of structure, and 24 inputs; the same ones at each call."""

    def build(name: str) -> Network:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            module = NETWORKS[name]()
            for part in module.modules():
                if isinstance(
                    part, nn.BatchNorm1d | nn.BatchNorm2d
                ):  # as after a training, so that folding it changes the weights
                    assert part.running_mean is not None
                    assert part.running_var is not None
                    part.running_mean.normal_(0, 0.2)
                    part.running_var.uniform_(0.5, 1.5)
                    nn.init.uniform_(part.weight, 0.5, 1.5)
            return module.eval(), torch.randn(24, 3, *SIZES.get(name, (8, 8)))

    return build


@pytest.fixture
def prepare() -> Callable[[nn.Module, Tensor], fx.GraphModule]:
    """The host's prepared graph of a model whose batch dimension is free."""
    from neural_compressor.torch.algorithms.pt2e_quant.core import W8A8PT2EQuantizer
    from neural_compressor.torch.export import export
    from neural_compressor.torch.quantization import INT8StaticQuantConfig

    from inc_clusterq.canonical import canonicalise

    logging.getLogger("neural_compressor").setLevel(logging.CRITICAL)

    def make(module: nn.Module, inputs: Tensor) -> fx.GraphModule:
        exported = export(module, (inputs[:2],), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
        canonicalise(exported)
        prepared: fx.GraphModule = W8A8PT2EQuantizer(quant_config=INT8StaticQuantConfig()).prepare(exported)
        return prepared

    return make
