from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
from torch import Tensor, fx, nn

from inc_clusterq.reconstruction.bits import BitPlan
from inc_clusterq.reconstruction.graph import Unit
from inc_clusterq.reconstruction.layers import Layer
from inc_clusterq.reconstruction.quantizers import QuantizedGraph, install_quantizers
from inc_clusterq.reconstruction.settings import ReconstructionSettings

Network = Callable[[str], tuple[nn.Module, Tensor]]
Prepare = Callable[[nn.Module, Tensor], fx.GraphModule]


@pytest.fixture
def quick() -> Callable[..., ReconstructionSettings]:
    """Settings of a reconstruction that takes a second or less; keys override them."""

    def make(**keys: object) -> ReconstructionSettings:
        defaults = {"iterations": 6, "batch_size": 8, "granularity": "block", "weight_learning_rate": 1e-2}
        return ReconstructionSettings.model_validate({**defaults, **keys})

    return make


@pytest.fixture
def prepared(network: Network, prepare: Prepare, _prepared_once: dict[str, fx.GraphModule]) -> Callable[[str], fx.GraphModule]:
    """A fresh copy of the host's prepared graph of a network."""

    def copy(name: str) -> fx.GraphModule:
        if name not in _prepared_once:
            _prepared_once[name] = prepare(*network(name))
        return deepcopy(_prepared_once[name])

    return copy


@pytest.fixture(scope="session")
def _prepared_once() -> dict[str, fx.GraphModule]:
    return {}


@pytest.fixture
def quantized(prepared: Callable[[str], fx.GraphModule]) -> Callable[..., QuantizedGraph]:
    """A fresh graph of a network with quantizers of 3 bits, 8 at its ends."""

    def make(name: str, settings: ReconstructionSettings | None = None, plan: BitPlan | None = None) -> QuantizedGraph:
        return install_quantizers(prepared(name), plan or BitPlan(3, 3), settings or ReconstructionSettings())

    return make


@pytest.fixture
def layer() -> Callable[..., Layer]:
    """A layer by hand; its quantizer is called `q_` and its name."""

    def make(
        name: str,
        shape: tuple[int, ...] = (4, 4, 3, 3),
        kind: str = "dense",
        stride: int = 1,
        dilation: int = 1,
        **keys: str | None,
    ) -> Layer:
        return Layer(name, f"{name}.weight", name, keys.get("quantizer", f"q_{name}"), kind, stride, dilation, shape)

    return make


@pytest.fixture
def unit() -> Callable[..., Unit]:
    """A unit by hand: all its layers lie on one path, unless a path is given."""

    def make(*layers: Layer, path: tuple[str, ...] | None = None) -> Unit:
        names = tuple(layer.name for layer in layers)
        return Unit(f"before_{names[0]}", names, layers, names if path is None else path)

    return make
