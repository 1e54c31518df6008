"""Networks that a user may have, each with something that stood in the way of its job once."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from neural_compressor.torch.export import export
from neural_compressor.torch.quantization import quantize
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch.nn import functional

from inc_clusterq import InputSpec, MRECGConfig
from inc_clusterq.adaptors.neural_compressor import NeuralCompressorAdaptor
from inc_clusterq.deployment.backend import DEQUANTIZE, QUANTIZE
from inc_clusterq.deployment.inductor import compile_frozen
from inc_clusterq.deployment.inductor_operators import compile_and_list
from inc_clusterq.deployment.operators import source_operators
from inc_clusterq.models import FloatModel

DYNAMIC = ({0: torch.export.Dim("batch", min=1, max=64)},)
aten = torch.ops.aten


class Odd(nn.Module):
    """Two convolutions and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Linear(8, 5)

    def end(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(x).mean((2, 3)))  # type: ignore[no-any-return]


class Frames(Odd):
    """Takes clips, and folds their frames into the batch."""

    def forward(self, x: Tensor) -> Tensor:
        frames = torch.relu(self.one(x.transpose(1, 2).flatten(0, 1)))
        return self.last(torch.relu(self.two(frames)).mean((2, 3)).view(-1, 4, 8).mean(1))  # type: ignore[no-any-return]


class Sequence(Odd):
    """Has the batch on the second axis behind its convolution, as recurrent networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.relu(self.one(x)).flatten(2).permute(2, 0, 1)
        return self.last(torch.relu(self.second(torch.relu(self.first(steps)))).mean(0))  # type: ignore[no-any-return]


class Upsampled(Odd):
    """Holds a layer that the host leaves in float."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.two(torch.relu(self.up(torch.relu(self.one(x))))))


class Centre(nn.Module):
    """Subtracts a mean that no checkpoint has."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x - self.mean  # type: ignore[operator]


class Centred(Odd):
    def __init__(self) -> None:
        super().__init__()
        self.centre = Centre()

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.two(torch.relu(self.one(self.centre(x)))))


class Preactivated(Odd):
    """Has a BatchNorm behind a convolution whose output the shortcut reads as well."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = normed(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return self.end(x + self.two(torch.relu(self.norm(x))))


class Siamese(Odd):
    """Calls one backbone, with its BatchNorm, for two parts of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = normed(8)

    def backbone(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.one(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.two(self.backbone(x[:, :, :4]) - self.backbone(x[:, :, 4:])))


class Blurred(Odd):
    """Has a fixed filter in front of a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filter", torch.ones(8, 1, 3, 3) / 9)
        self.norm = normed(8)

    def forward(self, x: Tensor) -> Tensor:
        blurred = functional.conv2d(torch.relu(self.one(x)), self.filter, stride=2, groups=8)  # type: ignore[arg-type]
        return self.end(self.two(torch.relu(self.norm(blurred))))


class UpsampledInGroups(Odd):
    """Has a BatchNorm behind a transposed convolution in groups."""

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(8, channels, 2, stride=2, groups=groups)
        self.norm, self.two = normed(channels), nn.Conv2d(channels, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.two(torch.relu(self.norm(self.up(torch.relu(self.one(x)))))))


class Unremembered(Odd):
    """Has a BatchNorm that goes by the batch at hand."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.two(torch.relu(self.norm(self.one(x)))))


class Positioned(Odd):
    """Adds a tensor of its own to a feature map."""

    def __init__(self) -> None:
        super().__init__()
        self.middle, self.position = nn.Conv2d(8, 8, 3, padding=1), nn.Parameter(torch.rand(1, 8, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.two(torch.relu(self.middle(torch.relu(self.one(x))) + self.position)))


class Multiplied(Odd):
    """Has matrices of its own in place of linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.rand(8, 16) - 0.3), nn.Parameter(torch.rand(5, 16) - 0.5)
        self.offset = nn.Parameter(torch.rand(16))

    def forward(self, x: Tensor) -> Tensor:
        features = torch.relu(self.two(torch.relu(self.one(x)))).mean((2, 3))
        return torch.relu(torch.addmm(self.offset, features, self.first)) @ self.second.t()


class Gated(Odd):
    """Weighs its channels by a hard sigmoid written by hand, behind linear layers or a convolution."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.one(x))
        means = x.mean((2, 3), keepdim=True)
        gate = self.gate(means) if isinstance(self.gate, nn.Conv2d) else self.gate(means.flatten(1))[:, :, None, None]
        return self.end(self.two(x * functional.relu6(gate + 3) / 6))


class Shifted(Odd):
    """Adds numbers to what a BatchNorm behind a convolution gives, in place, and to its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = normed(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.one(x))
        x += 0.5
        return 2 + self.end(self.two(torch.relu(x)))


class Reused(Odd):
    """Subtracts a layer's own bias from its output."""

    def forward(self, x: Tensor) -> Tensor:
        two = self.two(torch.relu(self.one(x)))
        assert self.two.bias is not None
        return self.end(two - 2 * self.two.bias[:, None, None])


class Recurrent(Odd):
    """Reads its feature maps with an LSTM, column by column, as networks for text and sound do."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8 * 8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.relu(self.two(torch.relu(self.one(x))))
        return self.last(self.lstm(maps.permute(0, 3, 1, 2).flatten(2))[0][:, -1])  # type: ignore[no-any-return]


def normed(channels: int) -> nn.BatchNorm2d:
    """A BatchNorm that does something."""
    norm = nn.BatchNorm2d(channels)
    with torch.no_grad():
        for value in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
            assert value is not None
            value.copy_(torch.rand(channels) + 0.3)
    return norm


class Limited(Odd):
    """Cuts a tensor that is quantized next, in a way of its own."""

    def __init__(self, limit: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.two(self.limit(self.one(x))))


LIMITS: dict[str, Callable[[Tensor], Tensor]] = {
    "from below": lambda x: x.clamp(min=0.1),
    "from above": lambda x: x.clamp(max=0.2),
    "far above what occurs": lambda x: functional.avg_pool2d(x, 2).clamp(0, 600),
    "of a pool": lambda x: functional.avg_pool2d(x, 2).clamp(-0.1, 0.3),
    "below zero, behind ReLU": lambda x: torch.relu(x).clamp(-3, -1),
    "zeros of a padding": lambda x: functional.pad(torch.relu(x), (0, 1, 0, 1)).clamp(0.3, 0.9),
    "above the zeros of a padding": lambda x: functional.pad(torch.relu(x), (0, 1, 0, 1)).clamp(min=0.3),
}


def quantized(net: nn.Module, inputs: Tensor, **keys: Any) -> Any:
    exported = export(net.eval(), (inputs[:2],), dynamic_shapes=DYNAMIC)
    return quantize(exported, MRECGConfig(iterations=4, views=1, **keys), run_fn=lambda model: model(inputs))


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(32, 3, 8, 8)


@torch.no_grad()
@pytest.mark.parametrize("granularity", ["layer", "modcap"])
@pytest.mark.parametrize(("make", "shape"), [(Frames, (3, 4, 8, 8)), (Sequence, (3, 8, 8))])  # 64 steps: as many as images
def test_a_unit_ends_only_where_every_row_is_an_image(
    make: Callable[[], nn.Module], shape: tuple[int, ...], granularity: str
) -> None:
    torch.manual_seed(0)
    net, inputs = make(), torch.randn(64, *shape)
    model = quantized(net, inputs, w_bits=8, act_bits=8, granularity=granularity)
    assert error(model(inputs), net(inputs)) < 0.03
    names = [layer for unit in model.reconstruction.units for layer in unit.layers]
    assert sorted(names) == sorted(name for name, _ in net.named_children() if name != "two" or make is Frames)


@torch.no_grad()
def test_what_the_host_leaves_in_float_is_not_raised_with_its_unit(images: Tensor) -> None:
    for units in (1, 2, 3):
        model = quantized(Upsampled(), images, w_bits=4, act_bits=4, fallback_units=units, granularity="layer")
        raised = [unit.lowest_bits for unit in model.reconstruction.units if unit.layers != ("up",)]
        assert raised == [8, 8, 8]  # the ends have 8 bits by themselves


@torch.no_grad()
def test_a_buffer_that_no_checkpoint_has_stays_where_it_is_read(images: Tensor) -> None:
    torch.manual_seed(0)
    net = Centred()
    model = quantized(net, images, w_bits=8, act_bits=8)
    assert error(model(images), net(images)) < 0.03
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (images,)), file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(images), model(images))


@torch.no_grad()
def test_a_recurrent_network_keeps_what_the_host_does_not_know_in_float(images: Tensor) -> None:
    torch.manual_seed(0)
    net = Recurrent()
    assert error(quantized(net, images, w_bits=8, act_bits=8)(images), net(images)) < 0.03


@torch.no_grad()
@pytest.mark.parametrize(
    "make",
    [
        *(Preactivated, Siamese, Blurred, Unremembered),
        *(partial(UpsampledInGroups, groups, channels) for groups, channels in ((1, 8), (4, 16), (8, 8))),
    ],
)
def test_a_batch_norm_is_folded_where_nothing_else_changes_by_it(images: Tensor, make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    net = make()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    model = quantized(net, images, w_bits=8, act_bits=8)
    assert error(model(images), net(images)) < 0.03
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize(
    "make",
    [
        lambda: Gated(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8))),
        lambda: Gated(nn.Conv2d(8, 8, 1)),
        Shifted,
    ],
)
def test_numbers_may_be_added_behind_layers(images: Tensor, make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    net = make()
    model = quantized(net, images, w_bits=8, act_bits=8)
    assert error(model(images), net(images)) < 0.03
    assert all(found.quantized for found in source_operators(model) if found.kind in ("convolution", "linear"))
    assert error(compile_frozen(model, images[:1])(images[:1]), model(images[:1])) < 0.01


@torch.no_grad()
def test_what_else_reads_a_bias_reads_it_as_it_was(images: Tensor) -> None:
    torch.manual_seed(0)
    net = Reused()
    model = quantized(net, images, w_bits=2, act_bits=8, granularity="layer", end_to_end_iterations=0)
    told = model.reconstruction.units[-1].loss
    assert told == pytest.approx(float((model(images) - net(images)).square().sum(1).mean()), rel=1e-4)


@torch.no_grad()
def test_a_batch_norm_that_stays_costs_no_search_for_patterns_of_training(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched = "torchao.quantization.pt2e.qat_utils._fold_conv_bn_qat_helper"
    monkeypatch.setattr(searched, lambda *given: pytest.fail("patterns are searched for"))
    net = Preactivated().eval()
    assert any("batch_norm" in str(node.target) for node in quantized(net, images).graph.nodes)
    exported = NeuralCompressorAdaptor().export(FloatModel("net", net, InputSpec((3, 8, 8)), 5, ""))
    NeuralCompressorAdaptor().quantize_static(exported, images.split(8))


@torch.no_grad()
def test_a_tensor_of_the_networks_own_has_8_bits(images: Tensor) -> None:
    torch.manual_seed(0)
    model = quantized(Positioned(), images, w_bits=4, act_bits=4)
    (addition,) = (node for node in model.graph.nodes if node.target is aten.add.Tensor)
    assert addition.args[1].target is DEQUANTIZE
    assert addition.args[1].args[4] == 255  # and no clamp in front
    assert addition.args[1].args[0].op == "get_attr"
    raised = quantized(Positioned(), images, w_bits=4, act_bits=4, fallback_units=9)
    assert {unit.lowest_bits for unit in raised.reconstruction.units} == {8}


@torch.no_grad()
def test_a_product_with_a_matrix_of_the_networks_own_is_a_linear_layer(images: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Multiplied()
    model = quantized(net, images, w_bits=8, act_bits=8)
    assert error(model(images), net(images)) < 0.03
    assert {(found.kind, found.quantized) for found in source_operators(model) if found.kind == "linear"} == {("linear", True)}
    assert sum(found.kind == "linear" for found in source_operators(model)) == 2
    narrow = quantized(
        net, images, w_bits=4, act_bits=4, workspace=str(tmp_path)
    )  # the last layer is a product, so both convolutions are not
    assert sorted(unit.lowest_bits for unit in narrow.reconstruction.units)[0] == 4


@torch.no_grad()
@pytest.mark.parametrize("limit", LIMITS)
def test_a_users_own_limits_are_kept(images: Tensor, limit: str) -> None:
    torch.manual_seed(0)
    net = Limited(LIMITS[limit])
    inputs = 2 * images
    model = quantized(net, inputs, w_bits=8, act_bits=8)
    assert error(model(inputs), net(inputs)) < 0.03
    on_integers = [node for node in model.graph.nodes if node.target is aten.clamp.default and node.args[0].target is QUANTIZE]
    assert all(node.args[2] < 256 for node in on_integers)


class Columns(Odd):
    """Ends in products with few inputs or few outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.plain = nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.one(x)).mean((2, 3))
        return self.last(torch.relu(self.plain(torch.relu(self.narrow(torch.relu(self.wide(x)))))))  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")  # the compiler's, at a product without a bias
@torch.no_grad()
def test_linear_operators_are_listed_as_what_they_became(images: Tensor) -> None:
    torch.manual_seed(0)
    model = quantized(Columns(), images, w_bits=8, act_bits=8)
    _, operators = compile_and_list(model, images[:1].clone())
    found = {operator.name: operator.precision for operator in operators if operator.kind == "linear"}
    assert found == {"wide": "int8", "narrow": "int8", "plain": "int8", "last": "float"}  # 8 inputs, 5 outputs, a bias


@pytest.mark.slow
@torch.no_grad()
def test_limits_far_above_what_occurs_compile(images: Tensor) -> None:
    torch.manual_seed(0)
    limited = Limited(LIMITS["far above what occurs"])
    model = quantized(limited, images, w_bits=8, act_bits=8, weight_ceiling=7)  # which no processor's kernels overflow on
    assert error(compile_frozen(model, images[:1].clone())(images[:1]), model(images[:1])) < 1e-3


@pytest.mark.slow
@torch.no_grad()
def test_one_channel_compiles_for_each_size_of_a_batch() -> None:
    """As the docs say to compile what the host loads; for any size at once Inductor does not take it."""
    torch.manual_seed(0)
    inputs, net = torch.randn(32, 1, 8, 8), nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))
    model = quantized(net, inputs)
    with inductor_config.patch(freezing=True):
        compiled: Callable[[Tensor], Tensor] = torch.compile(model, dynamic=False)
        for count in (1, 8, 3):
            assert error(compiled(inputs[:count]), model(inputs[:count])) < 1e-3
