from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn


@pytest.fixture
def export() -> Callable[[nn.Module, Tensor], fx.GraphModule]:
    """The host's export with a free batch dimension."""
    from neural_compressor.torch.export import export as host_export

    def make(module: nn.Module, inputs: Tensor) -> fx.GraphModule:
        exported: fx.GraphModule = host_export(
            module.eval(), (inputs[:2],), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},)
        )
        return exported

    return make
