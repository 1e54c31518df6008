"""Jobs of odd networks, each of which failed or was wrong once."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from neural_compressor.torch.export import export
from neural_compressor.torch.quantization import quantize
from odd_networks import (
    LIMITS,
    Attentive,
    Averaged,
    Blurred,
    Brightest,
    Centred,
    Columns,
    Conditional,
    DenselyJoined,
    Frames,
    Gated,
    Limited,
    Multiplied,
    Positioned,
    Preactivated,
    Recurrent,
    Reused,
    Sequence,
    Shifted,
    Shortcut,
    Siamese,
    TwiceNormed,
    Unread,
    Unremembered,
    Upsampled,
    UpsampledInGroups,
)
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch.nn import functional

from inc_clusterq import InputSpec, MRECGConfig
from inc_clusterq.adaptors.neural_compressor import NeuralCompressorAdaptor
from inc_clusterq.deployment import onnx, openvino
from inc_clusterq.deployment.backend import DEQUANTIZE, QUANTIZE
from inc_clusterq.deployment.inductor import check_parity, compile_frozen
from inc_clusterq.deployment.inductor_operators import compile_and_list
from inc_clusterq.deployment.operators import fallbacks, source_operators
from inc_clusterq.models import FloatModel

DYNAMIC = ({0: torch.export.Dim("batch", min=1, max=64)},)
aten = torch.ops.aten


def quantized(net: nn.Module, inputs: Tensor, **keys: Any) -> Any:
    exported = export(net.eval(), (inputs[:2],), dynamic_shapes=DYNAMIC)
    return quantize(exported, MRECGConfig(iterations=4, views=1, **keys), run_fn=lambda model: model(inputs))


def kept(net: nn.Module, inputs: Tensor) -> Any:
    """The network at 8 bits, which computes nearly what it did."""
    model = quantized(net, inputs, w_bits=8, act_bits=8)
    assert error(model(inputs), net(inputs)) < 0.03
    return model


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


def test_attention_in_one_operator_is_taken_apart(images: Tensor) -> None:
    torch.manual_seed(0)
    net = Attentive().eval()
    spec = InputSpec((3, 8, 8), -4.0, 4.0)
    exported = NeuralCompressorAdaptor().export(FloatModel("attentive", net, spec, 5, ""))
    model = quantize(exported, MRECGConfig(8, 8, iterations=4, views=1), run_fn=lambda module: module(images))
    with torch.no_grad():
        assert error(model(images), net(images)) < 0.03


@torch.no_grad()
def test_a_buffer_that_no_checkpoint_has_stays_where_it_is_read(images: Tensor) -> None:
    torch.manual_seed(0)
    net = Centred()
    model = kept(net, images)
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (images,)), file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(images), model(images))


@torch.no_grad()
def test_a_recurrent_network_keeps_what_the_host_does_not_know_in_float(images: Tensor) -> None:
    torch.manual_seed(0)
    kept(Recurrent(), images)


@torch.no_grad()
@pytest.mark.parametrize(
    "make",
    [
        *(Preactivated, Siamese, Blurred, Unremembered, TwiceNormed),
        *(partial(UpsampledInGroups, groups, channels) for groups, channels in ((1, 8), (4, 16), (8, 8))),
    ],
)
def test_a_batch_norm_is_folded_where_nothing_else_changes_by_it(images: Tensor, make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    net = make()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    kept(net, images)
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
    model = kept(net, images)
    assert all(found.quantized for found in source_operators(model) if found.kind in ("convolution", "linear"))
    assert error(compile_frozen(model, images[:1])(images[:1]), model(images[:1])) < 0.01


@torch.no_grad()
def test_a_layer_that_nothing_reads_is_no_part_of_the_job(images: Tensor) -> None:
    torch.manual_seed(0)
    model = kept(Unread(), images)
    assert sorted(layer for unit in model.reconstruction.units for layer in unit.layers) == ["last", "one"]


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
    model = kept(net, images)
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
    model = kept(net, inputs)
    on_integers = [node for node in model.graph.nodes if node.target is aten.clamp.default and node.args[0].target is QUANTIZE]
    assert all(node.args[2] < 256 for node in on_integers)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")  # the compiler's, at a product without a bias
@torch.no_grad()
def test_linear_operators_are_listed_as_what_they_became(images: Tensor) -> None:
    torch.manual_seed(0)
    model = quantized(Columns(), images, w_bits=8, act_bits=8)
    _, operators = compile_and_list(model, images[:1].clone())
    found = {operator.name: operator.precision for operator in operators if operator.kind == "linear"}
    assert found == {"wide": "int8", "narrow": "int8", "plain": "int8", "last": "float"}  # 8 inputs, 5 outputs, a bias


SHORTCUTS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "largest": (lambda x: functional.max_pool2d(x, 3, 1, 1), 8),
    "average": (lambda x: functional.avg_pool2d(x, 3, 1, 1), 8),
    "beside": (lambda x: torch.cat([x, functional.max_pool2d(x, 3, 1, 1)], 1), 16),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The input of maxpool2d is not quantized")  # torchao's, which says so too early
@torch.no_grad()
@pytest.mark.parametrize("activation", [torch.relu, functional.relu6, functional.hardswish, functional.silu])
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_an_activation_in_front_of_an_integer_shortcut_compiles(
    images: Tensor, activation: Callable[[Tensor], Tensor], shortcut: str
) -> None:
    torch.manual_seed(0)
    model = quantized(Shortcut(activation, *SHORTCUTS[shortcut]), images, w_bits=8, act_bits=8, weight_ceiling=7)
    compiled, operators = compile_and_list(model, images[:1].clone())
    assert error(compiled(images[:1]), model(images[:1])) < 1e-3
    assert [found.name for found in fallbacks(operators)] == ["last"]  # 8 inputs, 5 outputs, a bias


@pytest.mark.slow
@torch.no_grad()
def test_concatenations_of_one_tensor_are_none(images: Tensor) -> None:
    torch.manual_seed(0)
    model = quantized(DenselyJoined(), images, w_bits=8, act_bits=8)
    _, operators = compile_and_list(model, images[:1].clone())
    assert [found.precision for found in operators if found.kind == "concatenation"] == ["int8", "int8"]


@torch.no_grad()
def test_kernels_that_depend_on_the_batch_are_calibrated_with_batches_of_any_size(images: Tensor) -> None:
    torch.manual_seed(0)
    net = Conditional()
    exported = export(net.eval(), (images[:2],), dynamic_shapes=DYNAMIC)

    def run_fn(model: nn.Module) -> None:
        for batch in images[:27].split(4):
            model(batch)

    model = quantize(exported, MRECGConfig(8, 8, iterations=4, views=1), run_fn=run_fn)
    assert error(model(images), net(images)) < 0.03


@torch.no_grad()
@pytest.mark.parametrize("target", [onnx, openvino])
@pytest.mark.parametrize(
    "make",
    [
        Brightest,
        *(partial(Averaged, kernel, padding) for kernel, padding in ((2, 0), (3, 0), (3, 1))),
        partial(Averaged, 3, 1, counts_padding=False),
    ],
)
def test_other_run_times_compute_the_same(
    images: Tensor, tmp_path: Path, make: Callable[[], nn.Module], target: ModuleType
) -> None:
    torch.manual_seed(0)
    inputs = functional.pad(
        images, (0, 0, 0, 1)
    )  # 9 rows, which windows of 2 do not fill, and 8 columns, which those of 3 do not
    model = quantized(make(), inputs, w_bits=8, act_bits=8, weight_ceiling=7)
    target.export(model, tmp_path)
    assert check_parity(model, target.load(tmp_path), inputs).in_range < 2e-3  # what lies between two levels falls to either
    operators = target.operators(model, tmp_path)
    assert not [found for found in fallbacks(operators) if found.kind in ("convolution", "linear")]


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
