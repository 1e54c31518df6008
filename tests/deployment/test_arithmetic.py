from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from inc_clusterq.cpu import Cpu
from inc_clusterq.deployment.arithmetic import KernelArithmetic, kernel_arithmetic
from inc_clusterq.deployment.backend import DEQUANTIZE, DEQUANTIZE_WEIGHT, QUANTIZE
from inc_clusterq.deployment.inductor import compile_frozen
from inc_clusterq.deployment.saved import SavedModel
from inc_clusterq.evaluation import predictions

pytestmark = pytest.mark.usefixtures("fresh_compiler")
STRUCTURES = ["chain", "residual", "depthwise", "grouped", "concat", "shuffle", "in_place", "tied", "pooled", "padded"]
STRUCTURES += ["worded", "signal", "averaged", "scaled", "beside"]
BLOCKS = Cpu("with blocks", "x86_64", frozenset({"avx2", "avx512bw", "avx512_vnni"}))
NO_BLOCKS = Cpu("without", "x86_64", frozenset({"avx2"}))
SavedResult = Callable[..., SavedModel]
aten = torch.ops.aten


def product_program(
    weight: Tensor,
    scales: Tensor,
    bias: Tensor,
    x: tuple[float, int],
    out: tuple[float, int] | None,
    operator: Callable[..., Tensor] = aten.linear.default,
) -> fx.GraphModule:
    """quantize - dequantize - linear or convolution - [quantize - dequantize] with 8-bit activations."""
    root = nn.Module()
    for name, tensor in (("w", weight), ("s", scales), ("z", torch.zeros(len(scales), dtype=torch.int64)), ("b", bias)):
        root.register_buffer(name, tensor)
    graph = fx.Graph()
    node = graph.placeholder("x")

    def through(node: fx.Node, scale: float, zero_point: int) -> fx.Node:
        quantization = (scale, zero_point, 0, 255, torch.uint8)
        quantized = graph.call_function(QUANTIZE, (node, *quantization))
        return graph.call_function(DEQUANTIZE, (quantized, *quantization))

    node = through(node, *x)
    w, s, z, b = (graph.get_attr(name) for name in "wszb")
    dequantized = graph.call_function(DEQUANTIZE_WEIGHT, (w, s, z, 0, -127, 127, torch.int8))
    node = graph.call_function(operator, (node, dequantized, b))
    graph.output(through(node, *out) if out else node)
    return fx.GraphModule(root, graph)


def test_a_product_has_exact_sums_and_rounds_after_each_factor_as_the_processor_does() -> None:
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(0, 256, (64, 4096), generator=generator)
    weight = torch.randint(-127, 128, (7, 4096), generator=generator, dtype=torch.int8)
    scales, bias = torch.rand(7, generator=generator) * 0.01, torch.randn(7, generator=generator)
    program = product_program(weight, scales, bias, (0.0173, 13), None)
    inputs = (integers - 13).float() * 0.0173

    sums = (integers.numpy().astype(np.int64) - 13) @ weight.numpy().astype(np.int64).T  # far above 2**24 in size
    one_by_one = sums.astype(np.float32) * np.float32(0.0173) * scales.numpy() + bias.numpy()
    scales_first = sums.astype(np.float32) * (np.float32(0.0173) * scales.numpy()) + bias.numpy()
    assert np.abs(sums).max() < 2**24 < 255 * 127 * 4096  # exact in float32 themselves, their partial sums need not be
    assert np.array_equal(kernel_arithmetic(program, BLOCKS)(inputs).numpy(), one_by_one)
    assert np.array_equal(kernel_arithmetic(program, NO_BLOCKS)(inputs).numpy(), scales_first)
    assert not np.array_equal(one_by_one, scales_first)


@pytest.mark.parametrize("size", [1, 3])
def test_what_a_convolution_hands_on_in_float_is_that_of_this_processor_to_the_bit(size: int) -> None:
    """Where nothing is quantized behind it, each rounding of another kind shows in about a quarter of the values."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-64, 64, (32, 32, size, size), generator=generator, dtype=torch.int8)
    scales, bias = torch.rand(32, generator=generator) * 0.01, torch.randn(32, generator=generator)
    program = product_program(weight, scales, bias, (0.0173, 13), None, aten.conv2d.default)
    inputs = torch.rand(8, 32, 16, 16, generator=generator) * 4
    compiled = compile_frozen(program, inputs)
    with torch.no_grad():
        assert torch.equal(compiled(inputs), kernel_arithmetic(program)(inputs))


def test_a_kernel_adds_the_zero_point_before_it_rounds() -> None:
    """49,999,997e-8 rounds to 0, but 0.49999997 + 121 is 121.5 in float32, which rounds to the even 122."""
    program = product_program(
        torch.tensor([[1]], dtype=torch.int8), torch.ones(1), torch.tensor([-0.50000003]), (1.0, 0), (1.0, 121)
    )
    inputs = torch.tensor([[1.0]])
    assert program(inputs).item() == 0
    assert kernel_arithmetic(program)(inputs).item() == 1


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("residual", 8),
        ("pooled", 8),
        ("signal", 4),
        ("scaled", 8),
        ("tied", 8),
        *[pytest.param(name, bits, marks=pytest.mark.slow) for name in STRUCTURES for bits in (2, 4, 8)],
    ],
)
def test_the_compiled_model_is_equal_to_the_bit(saved: SavedResult, name: str, bits: int) -> None:
    model = saved(name, bits)
    inputs = torch.randn(64, *model.shape, generator=torch.Generator().manual_seed(1))
    compiled = compile_frozen(model.module, inputs[:2])  # of a single image the small last layer would be a loop in float
    with torch.no_grad():
        for scale in (1.0, 4.0):  # also beyond the calibrated range
            expected = kernel_arithmetic(model.module)(scale * inputs)
            found = torch.cat([compiled(image) for image in (scale * inputs).split(2)])
            assert int((found != expected).sum()) == 0


def test_it_is_the_saved_program_up_to_roundings_and_does_not_depend_on_the_batch(saved: SavedResult) -> None:
    model = saved("residual", 8)
    inputs = torch.randn(16, *model.shape, generator=torch.Generator().manual_seed(0))
    exact = kernel_arithmetic(model.module)
    with torch.no_grad():
        expected, found = model.module(inputs), exact(inputs)
        alone = torch.cat([exact(image) for image in inputs.split(1)])
    assert torch.equal(found, alone)
    spread = float(expected.max() - expected.min())
    assert float((found - expected).square().mean().sqrt()) < 0.005 * spread


def test_models_are_scored_as_kernels_compute_them(saved: SavedResult, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved("residual", 8)
    inputs = torch.randn(8, *model.shape, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(KernelArithmetic, "forward", lambda self, x: torch.eye(5)[torch.full((len(x),), 3)])
    assert predictions(model.module, inputs).tolist() == [3] * 8


def test_what_quantizes_nothing_is_left_as_it_is() -> None:
    module = nn.Linear(2, 2)
    assert kernel_arithmetic(module) is module
    traced = fx.symbolic_trace(module)
    assert kernel_arithmetic(traced) is traced
