from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from inc_clusterq.reconstruction.fake_quantize import BiasCorrection, Mode, WeightQuantizer
from inc_clusterq.reconstruction.from_outputs import passed_on, with_gradients_from_outputs
from inc_clusterq.reconstruction.graph import extract, join
from inc_clusterq.reconstruction.quantizers import QuantizedGraph, in_mode, initialise_activations, simulated
from inc_clusterq.reconstruction.settings import ReconstructionSettings

Network = Callable[[str], tuple[nn.Module, Tensor]]
Quantized = Callable[..., QuantizedGraph]

NETWORKS = [
    "chain",
    "residual",
    "depthwise",
    "grouped",
    "squeeze_excite",
    "shuffle",
    "tied",
    "transposed",
    "signal",
    "attentive",
]


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_gradients_are_those_of_autograd(network: Network, quantized: Quantized, name: str, joint: bool) -> None:
    _, inputs = network(name)
    graph = quantized(name, ReconstructionSettings(learn_weight_scale=joint))
    initialise_activations(graph, inputs, 64)
    plain = extract(graph.graph_module, join(list(graph.units)))
    generator = torch.Generator().manual_seed(0)
    for part in simulated(plain):
        if isinstance(part, BiasCorrection):
            part.fix(torch.randn(part.shift.shape, generator=generator) / 10, torch.ones_like(part.unit))
    learned = {name: value for name, value in plain.named_parameters() if not name.endswith(".v")}
    for value in learned.values():
        value.requires_grad_()
    direction = torch.randn(plain(inputs).shape, generator=generator)
    with in_mode(plain, Mode.STEPS):
        expected = plain(inputs)
        wanted = torch.autograd.grad((expected * direction).sum(), list(learned.values()), allow_unused=True)
        outputs = with_gradients_from_outputs(plain)(inputs)
        found = torch.autograd.grad((outputs * direction).sum(), list(learned.values()), allow_unused=True)
    assert torch.equal(outputs, expected)
    of_scales = 0
    for key, one, other in zip(learned, found, wanted, strict=True):
        owner = plain.get_submodule(key.rpartition(".")[0])
        if not isinstance(owner, (WeightQuantizer, BiasCorrection)) and "scale_shift" not in key:
            continue  # weights and biases of the float network, which nothing learns
        assert (one is None) == (other is None), key
        if one is not None and other is not None:
            of_scales += isinstance(owner, WeightQuantizer)
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
    assert bool(of_scales) == joint


def test_gradients_of_one_channel_worked_out_by_hand() -> None:
    # y = s (q * x) + b with q * x = (2, -1), s = 3, b = 1: y = (7, -2); dL/dlog s = 5 * 6 + 1 * (-3), dL/db = 5 + 1
    y = torch.tensor([[[7.0, -2.0]]], requires_grad=True)
    bias, shift = torch.ones(1, requires_grad=True), torch.zeros(1, 1, 1, requires_grad=True)
    outputs = passed_on(y, bias, shift, -2)
    outputs.backward(torch.tensor([[[5.0, 1.0]]]))
    assert torch.equal(outputs, y)
    found = [value.grad.flatten().tolist() for value in (y, bias, shift) if value.grad is not None]
    assert found == [[5.0, 1.0], [6.0], [27.0]]


def test_a_channel_without_input_gets_exactly_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    bias = (10 * torch.randn(8, generator=generator)).requires_grad_()
    shift = torch.zeros(8, 1, 1, 1, requires_grad=True)
    y = bias.detach()[:, None, None].expand(4, 8, 9, 9).contiguous()
    passed_on(y, bias, shift, -3).backward(torch.randn(y.shape, generator=generator))
    assert shift.grad is not None
    assert shift.grad.tolist() == torch.zeros(8, 1, 1, 1).tolist()


@pytest.mark.parametrize(("shape", "axis"), [((5,), -1), ((2, 3, 5), -1), ((5, 3, 2), -3), ((4, 5, 2, 3, 2), -4)])
def test_channels_are_on_the_axis_of_the_operator(shape: tuple[int, ...], axis: int) -> None:
    generator = torch.Generator().manual_seed(0)
    product, grad = torch.randn(2, *shape, generator=generator)
    bias, shift = (torch.randn(5, generator=generator).requires_grad_() for _ in range(2))
    along = [1] * len(shape)
    along[axis] = 5
    passed_on((product * shift.detach().exp().view(along) + bias.detach().view(along)), bias, shift, axis).backward(grad)
    expected = torch.autograd.grad((grad * (product * shift.exp().view(along) + bias.view(along))).sum(), (bias, shift))
    for learned, wanted in zip((bias, shift), expected, strict=True):
        torch.testing.assert_close(learned.grad, wanted)
