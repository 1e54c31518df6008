"""The evaluated model with sums that do not depend on their order: what deployed models are compared with.

In float32 a convolution's sum depends on the order of its terms. A value near the border between two levels then falls to
either side, and a 4-bit network carries that on: the evaluated model differs from itself, one image at a time against
batches, by about as much as a deployed one does. Products of quantized values add up exactly in float64, so that here
convolutions and linear operators sum in it and round to float32 once; all else is as it was evaluated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from inc_clusterq.deployment.operators import KINDS, WEIGHTED


class ExactSums(nn.Module):
    """A saved program, run node by node."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _Interpreter(self.module).run(x)
        return result


class _Interpreter(fx.Interpreter):
    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if KINDS.get(target) not in WEIGHTED:
            return super().call_function(target, args, kwargs)
        wide = tuple(value.double() if isinstance(value, Tensor) else value for value in args)
        return super().call_function(target, wide, kwargs).to(torch.float32)


def exact_sums(module: nn.Module) -> nn.Module:
    """`module` with exact sums where its graph is known; any other module as it is."""
    return ExactSums(module) if isinstance(module, fx.GraphModule) else module
