from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor, fx, nn

from inc_clusterq.reconstruction.bits import BitPlan
from inc_clusterq.reconstruction.checkpoint import UnitStore
from inc_clusterq.reconstruction.quantizers import QuantizedGraph, install_quantizers
from inc_clusterq.reconstruction.reconstruct import reconstruct
from inc_clusterq.reconstruction.settings import ReconstructionSettings


@pytest.fixture
def reconstructed(
    network: Callable[[str], tuple[nn.Module, Tensor]], prepare: Callable[[nn.Module, Tensor], fx.GraphModule]
) -> Callable[..., QuantizedGraph]:
    """A reconstructed graph of a network, ready to be converted."""

    def make(name: str, bits: int = 4, edge: int = 8, **keys: object) -> QuantizedGraph:
        module, inputs = network(name)
        settings = ReconstructionSettings.model_validate({"iterations": 3, "batch_size": 8, "granularity": "block", **keys})
        graph = install_quantizers(prepare(module, inputs), BitPlan(bits, bits, edge), settings)
        reconstruct(graph, inputs, settings, seed=0, store=UnitStore())
        return graph

    return make
