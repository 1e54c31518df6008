from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from neural_compressor.torch.export import export
from torch import Tensor, nn

Network = Callable[[str], tuple[nn.Module, Tensor]]
DYNAMIC = ({0: torch.export.Dim("batch", min=1, max=64)},)


@pytest.fixture(autouse=True)
def _silent_host() -> Iterator[None]:
    logger = logging.getLogger("neural_compressor")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(before)


@pytest.fixture
def exported(network: Network) -> nn.Module:
    """The host's export of a residual network."""
    module, inputs = network("residual")
    result: nn.Module = export(module, (inputs[:2],), dynamic_shapes=DYNAMIC)
    return result


@pytest.fixture
def inputs(network: Network) -> Tensor:
    return network("residual")[1]


@pytest.fixture
def run_fn(inputs: Tensor) -> Callable[[nn.Module], None]:
    """Calibration in batches, the last one short."""

    def run(model: nn.Module) -> None:
        for batch in inputs.split(10):
            model(batch)

    return run
