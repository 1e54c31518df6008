from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torch._inductor import config as inductor_config

from inc_clusterq.cpu import SAFE_WEIGHT_BITS, cpu, overflows
from inc_clusterq.deployment.preparation import prepare_for_kernels
from inc_clusterq.deployment.qdq import convert
from inc_clusterq.deployment.saved import HOST_CONFIG, PROGRAM, SavedModel, open_result
from inc_clusterq.output import RESULT
from inc_clusterq.reconstruction.bits import BitPlan
from inc_clusterq.reconstruction.checkpoint import UnitStore
from inc_clusterq.reconstruction.quantizers import QuantizedGraph, install_quantizers
from inc_clusterq.reconstruction.reconstruct import reconstruct
from inc_clusterq.reconstruction.settings import ReconstructionSettings


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing is taken from what other tests or processes have compiled."""
    torch._dynamo.reset()
    with inductor_config.patch(fx_graph_cache=False):
        yield
    torch._dynamo.reset()


@pytest.fixture
def reconstructed(
    network: Callable[[str], tuple[nn.Module, Tensor]], prepare: Callable[[nn.Module, Tensor], fx.GraphModule]
) -> Callable[..., QuantizedGraph]:
    """A reconstructed graph of a network, ready to be converted, with no wider weights than this machine computes."""
    effort = {"iterations": 3, "batch_size": 8, "granularity": "block"}
    ceiling = {"weight_ceiling": SAFE_WEIGHT_BITS} if overflows(cpu()) else {}

    def make(name: str, bits: int = 4, edge: int = 8, **keys: object) -> QuantizedGraph:
        module, inputs = network(name)
        settings = ReconstructionSettings.model_validate({**effort, **ceiling, **keys})
        graph = install_quantizers(prepare(module, inputs), BitPlan(bits, bits, edge), settings)
        reconstruct(graph, inputs, settings, seed=0, store=UnitStore())
        return graph

    return make


SavedResult = Callable[..., SavedModel]


@pytest.fixture
def saved(
    reconstructed: Callable[..., QuantizedGraph],
    network: Callable[[str], tuple[nn.Module, Tensor]],
    tmp_path_factory: pytest.TempPathFactory,
    _saved_once: dict[str, SavedModel],
) -> SavedResult:
    """A network's result folder, as `quantize` leaves it but without its figures; made once for each set of bits and keys."""

    def make(name: str, bits: int = 4, edge: int = 8, **keys: object) -> SavedModel:
        key = "-".join([name, str(bits), str(edge), *(f"{setting}={value}" for setting, value in keys.items())])
        if key not in _saved_once:
            module = convert(reconstructed(name, bits, edge, **keys))
            prepare_for_kernels(module)
            folder = tmp_path_factory.mktemp(key)
            write_result(folder, module, network(name)[1][:2])
            _saved_once[key] = open_result(folder)
        return _saved_once[key]

    return make


@pytest.fixture(scope="session")
def _saved_once() -> dict[str, SavedModel]:
    return {}


def write_result(folder: Path, module: fx.GraphModule, example: Tensor) -> None:
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    with (folder / PROGRAM).open("wb") as stream:
        torch.export.save(torch.export.export(module, (example,), dynamic_shapes=shapes), stream)
    (folder / HOST_CONFIG).write_text(json.dumps({"static_quant": {}}))
    described = {"shape": list(example.shape[1:]), "range": [-4, 4], "mean": [0], "std": [1]}
    (folder / RESULT).write_text(json.dumps({"format": 1, "config": {"model": {"input": described}}}))
