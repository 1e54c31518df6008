from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from inc_clusterq.deployment import onnx as target
from inc_clusterq.deployment.inductor import check_parity
from inc_clusterq.deployment.onnx_bias import between_borders
from inc_clusterq.deployment.onnx_graph import Graph
from inc_clusterq.deployment.onnx_rewrite import rewrite
from inc_clusterq.deployment.operators import SourceOperator, fallbacks, node_name
from inc_clusterq.deployment.saved import SavedModel
from inc_clusterq.errors import DeploymentError, MissingDependencyError, ResultError

SavedResult = Callable[..., SavedModel]
ALL_INT8 = ["residual", "depthwise", "concat", "pooled", "padded", "averaged", "scaled", "tied"]


@pytest.fixture
def exported(saved: SavedResult, tmp_path: Path) -> Callable[..., tuple[SavedModel, Path]]:
    def make(name: str, bits: int = 4, edge: int = 8) -> tuple[SavedModel, Path]:
        model = saved(name, bits, edge)
        target.export(model.module, tmp_path)
        return model, tmp_path

    return make


def beyond(shape: tuple[int, ...], images: int = 24) -> torch.Tensor:
    return torch.randn(images, *shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("name", "bits"), [("residual", 4), ("depthwise", 8), ("concat", 4)])
def test_every_convolution_and_linear_operator_runs_in_int8(
    exported: Callable[..., tuple[SavedModel, Path]], name: str, bits: int
) -> None:
    model, folder = exported(name, bits)
    operators = target.operators(model.module, folder)
    weighted = [found for found in operators if found.kind in ("convolution", "linear")]
    expected = {"residual": 6, "depthwise": 6, "concat": 8}[name]
    assert [found.precision for found in weighted] == ["int8"] * expected
    assert not [found for found in fallbacks(operators) if found.kind in ("convolution", "linear")]
    assert weighted[0].name == "stem.0"
    assert weighted[-1].name == "fc"


def test_what_has_no_weights_takes_no_layers_place(exported: Callable[..., tuple[SavedModel, Path]]) -> None:
    model, folder = exported("attentive", 8)
    operators = target.operators(model.module, folder)
    weighted = {found.name: found.precision for found in operators if found.kind in ("convolution", "linear")}
    assert weighted == dict.fromkeys(("stem.0", "query", "local_token_mix.0", "squeeze", "excite", "fc"), "int8")
    assert not [found for found in operators if found.kernel == "not found"]


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("residual", 4),
        ("depthwise", 2),
        ("concat", 8),
        ("signal", 4),
        ("averaged", 8),
        *[pytest.param(name, bits, marks=pytest.mark.slow) for name in ALL_INT8 for bits in (2, 3, 4, 6, 8)],
    ],
)
def test_it_computes_what_was_evaluated_also_beyond_the_calibrated_range(
    exported: Callable[..., tuple[SavedModel, Path]], name: str, bits: int
) -> None:
    model, folder = exported(name, bits)
    parity = check_parity(model.module, target.load(folder), beyond(model.shape))  # raises above 1 %
    assert parity.agreement >= 0.95


def test_with_inputs_and_weights_of_4_bits_no_sum_changes_its_level(
    exported: Callable[..., tuple[SavedModel, Path]],
) -> None:
    """Integers all the way, so that nothing but the order of float additions in the last layer may differ."""
    model, folder = exported("depthwise", 4, edge=4)
    inputs = beyond(model.shape, 64) * 3
    with torch.no_grad():
        expected = model.module(inputs)
    found = target.load(folder)(inputs)
    spread = float(expected.max() - expected.min())
    share = (found - expected).abs().amax(1) > 1e-5 * spread
    assert float(share.double().mean()) <= 0.05  # a sum within float rounding of a border may fall to either side


def test_the_batch_dimension_is_free(exported: Callable[..., tuple[SavedModel, Path]]) -> None:
    model, folder = exported("residual")
    session = target.load(folder)
    inputs = beyond(model.shape, 7)
    one_by_one = torch.cat([session(image) for image in inputs.split(1)])
    assert torch.allclose(session(inputs), one_by_one, atol=1e-6)


def test_clamps_below_8_bits_survive_as_clips_of_integers(exported: Callable[..., tuple[SavedModel, Path]]) -> None:
    _, folder = exported("residual", 4)
    graph = Graph.of(onnx.load(folder / target.MODEL))
    clips = [node for node in graph.model.graph.node if node.op_type == "Clip"]
    assert clips
    assert {int(graph.constants[clip.input[2]].item()) for clip in clips} == {15}
    assert all(graph.producer[clip.input[0]].op_type == "QuantizeLinear" for clip in clips)


def test_plain_onnx_runtime_opens_the_file_and_needs_nothing_else(exported: Callable[..., tuple[SavedModel, Path]]) -> None:
    model, folder = exported("chain")
    data = (folder / target.MODEL).read_bytes()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    inputs = beyond(model.shape, 3)
    (outputs,) = session.run(None, {"input": inputs.numpy()})
    assert np.array_equal(outputs, target.load(folder)(inputs).numpy())
    assert {domain.domain for domain in onnx.load(folder / target.MODEL).opset_import} == {""}
    assert b".py" not in data  # no source files of whoever exported it


def test_names_may_hold_what_run_times_write_between_theirs() -> None:
    source = SourceOperator("branch/3x3,a", "convolution", "conv2d", quantizable=True, quantized=True)
    assert node_name(source) == "convolution:branch%2F3x3%2Ca"


def test_a_convolution_that_the_host_leaves_in_float_is_listed_with_the_reason(
    exported: Callable[..., tuple[SavedModel, Path]],
) -> None:
    model, folder = exported("transposed")
    (fallen,) = [found for found in target.operators(model.module, folder) if found.name == "up"]
    assert fallen.fell_back
    assert "host's quantizer leaves" in fallen.reason


def test_the_bias_between_borders_keeps_every_sum_on_its_level() -> None:
    generator = np.random.default_rng(0)
    unit, sums = 128, np.arange(-300, 300)
    bias = generator.uniform(-5000, 5000, 50)
    borders = np.repeat(np.sort(generator.uniform(-20000, 20000, (1, 15)), axis=1), 50, 0)
    first = np.ceil((borders - bias[:, None]) / unit)
    reachable = (np.full((50, 1), -300), np.full((50, 1), 299))
    low, high = between_borders(borders, first, reachable, unit, bias)
    assert ((low <= bias) & (bias < high)).all()
    integers = np.rint((low + high) / 2)
    kept = (low < integers) & (integers < high)
    assert kept.mean() > 0.9
    for real, integer in zip(bias[kept], integers[kept], strict=True):
        exact = np.searchsorted(borders[0], unit * sums + real)
        assert np.array_equal(exact, np.searchsorted(borders[0], unit * sums + integer))


def test_borders_that_no_sum_reaches_do_not_narrow_the_bias() -> None:
    borders, first = np.array([[10.5]]), np.array([[np.ceil((10.5 - 0.25) / 8)]])
    never = (np.array([[-1]]), np.array([[1]]))  # sums -8, 0 and 8: all below 10.5
    low, high = between_borders(borders, first, never, 8, np.array([0.25]))
    assert (low[0], high[0]) == (0.25 - 8, 2.5)


@pytest.mark.parametrize("between", ["Pad", "Reshape"])
def test_behind_a_padding_or_a_reshape_no_sum_of_4_bits_changes_its_level(between: str) -> None:
    rng, channels = np.random.default_rng(0), 1024
    constants = {
        "scale_1": np.float32(0.388),
        "scale_2": np.float32(0.385),
        "zero": np.uint8(0),
        "widths": np.array([0, 0, 0, 0, 0, 0, 1, 1]),
        "shape": np.array([1, channels, 16, 64]),
        "least": np.float32(0),
        "most_1": np.float32(15 * 0.388),
        "most_2": np.float32(15 * 0.385),
        "weight": rng.integers(-8, 8, (channels, 1, 3, 3)).astype(np.int8),
        "weight_scale": rng.uniform(0.02, 0.1, channels).astype(np.float32),
        "weight_zero": np.zeros(channels, np.int8),
        "bias": rng.normal(size=channels).astype(np.float32),
    }
    make = onnx.helper.make_node
    nodes = [
        make("Clip", ["input", "least", "most_1"], ["clipped_1"]),
        make("QuantizeLinear", ["clipped_1", "scale_1", "zero"], ["levels_1"]),
        {
            "Pad": make("Pad", ["levels_1", "widths", "zero"], ["between"]),
            "Reshape": make("Reshape", ["levels_1", "shape"], ["between"]),
        }[between],
        make("DequantizeLinear", ["between", "scale_1", "zero"], ["x"]),
        make("DequantizeLinear", ["weight", "weight_scale", "weight_zero"], ["real_weight"], axis=0),
        make("Conv", ["x", "real_weight", "bias"], ["sums"], name="conv", group=channels, strides=[2, 2]),
        make("Clip", ["sums", "least", "most_2"], ["clipped_2"]),
        make("QuantizeLinear", ["clipped_2", "scale_2", "zero"], ["levels_2"]),
        make("DequantizeLinear", ["levels_2", "scale_2", "zero"], ["output"]),
    ]
    model = _model(nodes, constants, {"input": [1, channels, 32, 32], "output": [1, channels, None, None]})
    x = rng.uniform(-1, 7, (1, channels, 32, 32)).astype(np.float32)
    expected = ReferenceEvaluator(model).run(None, {"input": x})[0]  # type: ignore[index]
    session = onnxruntime.InferenceSession(rewrite(model).SerializeToString(), providers=["CPUExecutionProvider"])
    wrong = np.abs(session.run(None, {"input": x})[0] - expected).max((0, 2, 3)) > 0.001
    assert wrong.sum() <= 1  # a sum within float rounding of a border may fall to either side


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("left", [0, 1])  # integers of the channel whose scale is the least there is
def test_a_bias_that_is_everything_in_its_channel_is_kept(group: int, left: int) -> None:
    rng = np.random.default_rng(0)
    weight, scale = rng.integers(-64, 64, (4, 4 // group, 3, 3)).astype(np.int8), rng.uniform(0.001, 0.002, 4)
    weight[2], scale[2] = left, 2.0**-23
    constants = {
        "scale_1": np.float32(1 / 255),
        "scale_2": np.float32(0.02),
        "zero": np.uint8(0),
        "weight": weight,
        "weight_scale": scale.astype(np.float32),
        "weight_zero": np.zeros(4, np.int8),
        "bias": np.array([0.1, -0.1, 2.5, 0.2], np.float32),  # the third is 5e9 in units of its sums
    }
    make = onnx.helper.make_node
    nodes = [
        make("QuantizeLinear", ["input", "scale_1", "zero"], ["levels_1"]),
        make("DequantizeLinear", ["levels_1", "scale_1", "zero"], ["x"]),
        make("DequantizeLinear", ["weight", "weight_scale", "weight_zero"], ["real_weight"], axis=0),
        make("Conv", ["x", "real_weight", "bias"], ["sums"], name="conv", group=group),
        make("QuantizeLinear", ["sums", "scale_2", "zero"], ["levels_2"]),
        make("DequantizeLinear", ["levels_2", "scale_2", "zero"], ["output"]),
    ]
    model = _model(nodes, constants, {"input": [1, 4, 6, 6], "output": [1, 4, 4, 4]})
    x = rng.uniform(0, 1, (1, 4, 6, 6)).astype(np.float32)
    expected = ReferenceEvaluator(model).run(None, {"input": x})[0]  # type: ignore[index]
    session = onnxruntime.InferenceSession(rewrite(model).SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"input": x})[0]
    assert np.abs(found - expected).max() <= 0.0201  # the bias is rounded, which moves a sum by one level at most
    assert np.abs(found[:, 2] - 2.5).max() < 0.001


def test_a_second_rounding_to_other_levels_is_kept_and_what_is_behind_it_runs_in_int8(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    constants = {
        "scale_1": np.float32(0.0258),
        "scale_2": np.float32(0.0264),
        "scale_3": np.float32(0.05),
        "zero": np.uint8(0),
        "weight": rng.integers(-64, 64, (8, 4, 1, 1)).astype(np.int8),  # 7 bits, which no processor's kernel overflows
        "weight_scale": rng.uniform(0.005, 0.01, 8).astype(np.float32),
        "weight_zero": np.zeros(8, np.int8),
        "bias": rng.normal(size=8).astype(np.float32),
    }
    make = onnx.helper.make_node
    nodes = [
        make("QuantizeLinear", ["input", "scale_1", "zero"], ["levels_1"]),
        make("DequantizeLinear", ["levels_1", "scale_1", "zero"], ["once"]),
        make("QuantizeLinear", ["once", "scale_2", "zero"], ["levels_2"]),
        make("DequantizeLinear", ["levels_2", "scale_2", "zero"], ["twice"]),
        make("DequantizeLinear", ["weight", "weight_scale", "weight_zero"], ["real_weight"], axis=0),
        make("Conv", ["twice", "real_weight", "bias"], ["sums"], name="conv"),
        make("QuantizeLinear", ["sums", "scale_3", "zero"], ["levels_3"]),
        make("DequantizeLinear", ["levels_3", "scale_3", "zero"], ["output"]),
    ]
    model = _model(nodes, constants, {"input": [1, 4, 6, 6], "output": [1, 8, 6, 6]})
    x = rng.uniform(0, 6.5, (1, 4, 6, 6)).astype(np.float32)
    expected = ReferenceEvaluator(model).run(None, {"input": x})[0]  # type: ignore[index]

    rewritten = rewrite(model).SerializeToString()
    settings = onnxruntime.SessionOptions()
    settings.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    found = onnxruntime.InferenceSession(rewritten, settings, providers=["CPUExecutionProvider"]).run(None, {"input": x})[0]
    assert np.abs(found - expected).max() <= 0.0501  # the bias is rounded, which moves a sum by one level at most
    assert np.mean(np.abs(found - expected) > 0.001) < 0.01
    assert "QLinearConv" in {node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node}


def _model(nodes: list[onnx.NodeProto], constants: dict[str, Any], ends: dict[str, list[int | None]]) -> onnx.ModelProto:
    values = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    infos = [onnx.helper.make_tensor_value_info(name, 1, shape) for name, shape in ends.items()]
    for node in nodes:
        node.name = node.name or node.output[0]
    graph = onnx.helper.make_graph(nodes, "made by hand", infos[:1], infos[1:], values)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("package", ["onnxruntime", "onnx", "onnxscript"])
def test_a_missing_package_is_named_with_its_extra(
    saved: SavedResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    for name in ("rewrite", "graph", "bias"):  # as in a process that has not exported yet
        monkeypatch.delitem(sys.modules, f"inc_clusterq.deployment.onnx_{name}")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=rf"{package} is needed .*inc-clusterq\[onnx\]"):
        target.export(saved("chain").module, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_model_or_with_a_damaged_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match=r"holds no model\.onnx"):
        target.load(tmp_path)
    (tmp_path / target.MODEL).write_bytes(b"not a model")
    with pytest.raises(DeploymentError, match="cannot open"):
        target.load(tmp_path)
