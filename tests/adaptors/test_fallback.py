from __future__ import annotations

from collections.abc import Callable

import torch
from neural_compressor.torch.export import export
from neural_compressor.torch.quantization import quantize
from torch import Tensor, nn
from torch.nn import functional

from inc_clusterq import MRECGConfig
from inc_clusterq.reconstruction.reconstruct import UnitReport

QUICK = {"iterations": 4, "batch_size": 8}
DYNAMIC = ({0: torch.export.Dim("batch", min=1, max=64)},)


class Cancelling(nn.Module):
    """What `rough` returns lies far from 0, and little of it is left by `exact`, whose weights 2 bits can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rough = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.exact, self.last = nn.Conv2d(8, 4, 1), nn.Linear(4, 5)
        with torch.no_grad():
            self.rough.bias.fill_(3)  # type: ignore[union-attr]
            self.exact.weight.copy_(torch.cat([torch.eye(4), -torch.eye(4)], 1)[:, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        differences = self.exact(self.rough(torch.relu(self.first(x))))
        result: Tensor = self.last(torch.relu(differences).mean((2, 3)))
        return result


@torch.no_grad()
def test_a_unit_falls_back_for_what_it_spoils_itself_and_not_for_what_it_is_given(inputs: Tensor) -> None:
    torch.manual_seed(0)
    module = Cancelling().eval()

    def units(count: int) -> list[UnitReport]:
        config = MRECGConfig(w_bits=2, act_bits=8, granularity="layer", fallback_units=count, **QUICK)  # type: ignore[arg-type]
        source = export(module, (inputs[:2],), dynamic_shapes=DYNAMIC)
        model = quantize(source, config, run_fn=lambda model: model(inputs))
        return list(model.reconstruction.units)

    _, rough, exact, _ = units(0)
    assert exact.relative_loss > 2 * rough.relative_loss
    assert [unit.weight_bits for unit in units(1)] == [8, 8, 2, 8]


def test_units_fall_back_to_no_more_bits_than_weights_may_have(
    exported: nn.Module, run_fn: Callable[[nn.Module], None]
) -> None:
    config = MRECGConfig(w_bits=8, act_bits=8, fallback_units=2, weight_ceiling=7, granularity="block", **QUICK)  # type: ignore[arg-type]
    model = quantize(exported, config, run_fn=run_fn)
    assert {unit.lowest_bits for unit in model.reconstruction.units} == {7}


def test_activations_fall_back_where_weights_may_not(exported: nn.Module, run_fn: Callable[[nn.Module], None]) -> None:
    config = MRECGConfig(w_bits=4, act_bits=4, fallback_units=2, weight_ceiling=4, granularity="block", **QUICK)  # type: ignore[arg-type]
    model = quantize(exported, config, run_fn=run_fn)
    assert [(unit.weight_bits, unit.activation_bits) for unit in model.reconstruction.units] == [(4, 8)] * 4


class Projected(nn.Module):
    """A residual block whose shortcut is a convolution, which nothing but the sum reads; its stride is one number in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.shortcut, self.last = nn.Parameter(torch.randn(8, 8, 1, 1)), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        y = self.two(torch.relu(self.one(x)))
        return self.last(torch.relu(y + functional.conv2d(x, self.shortcut, stride=[2])).mean((2, 3)))  # type: ignore[no-any-return]


@torch.no_grad()
def test_a_block_with_a_convolution_in_its_shortcut_falls_back_as_a_whole(inputs: Tensor) -> None:
    torch.manual_seed(0)
    config = MRECGConfig(w_bits=3, act_bits=3, fallback_units=1, granularity="block", **QUICK)  # type: ignore[arg-type]
    model = quantize(
        export(Projected().eval(), (inputs[:2],), dynamic_shapes=DYNAMIC), config, run_fn=lambda model: model(inputs)
    )
    assert {unit.lowest_bits for unit in model.reconstruction.units} == {8}
