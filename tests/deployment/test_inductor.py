from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.exc import CppCompileError
from torch._inductor.utils import run_and_get_code

from inc_clusterq.deployment.inductor import Compiled, check_parity, compile_frozen, difference
from inc_clusterq.deployment.preparation import prepare_for_kernels
from inc_clusterq.deployment.qdq import convert
from inc_clusterq.errors import DeploymentError
from inc_clusterq.reconstruction.quantizers import QuantizedGraph

pytestmark = pytest.mark.usefixtures("fresh_compiler")
STRUCTURES = ["chain", "depthwise", "grouped", "squeeze_excite", "concat", "shuffle", "in_place", "tied", "pooled", "padded"]
STRUCTURES += ["transposed", "worded", "signal", "beside"]
Network = Callable[[str], tuple[nn.Module, Tensor]]
Reconstructed = Callable[..., QuantizedGraph]


def compiled_with_code(model: nn.Module, example: Tensor) -> tuple[Compiled, str]:
    compiled, codes = run_and_get_code(compile_frozen, model, example)
    return compiled, "\n".join(codes)


def test_a_4_bit_model_runs_on_int8_kernels_and_computes_what_was_evaluated(
    reconstructed: Reconstructed, network: Network
) -> None:
    _, inputs = network("residual")
    converted = convert(reconstructed("residual"))
    compiled, code = compiled_with_code(converted, inputs[:1])
    assert code.count("torch.ops.onednn.qconv") == 5  # every convolution; the compiler inlines so small a linear layer
    assert "convolution" not in code.replace("qconv", "")
    parity = check_parity(converted, compiled, inputs)
    assert parity.images == len(inputs)
    assert parity.agreement == 1.0
    # Sums in another order; a lost clamp makes 1e-2 of it.
    assert max(parity.in_range, parity.out_of_range) < 1e-5


def test_without_the_clamps_the_compiled_model_is_another_one(
    reconstructed: Reconstructed, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inc_clusterq.deployment.qdq.write_clamps", lambda graph_module: 0)
    _, inputs = network("residual")
    converted = convert(reconstructed("residual"))
    compiled = compile_frozen(converted, inputs[:1])
    with pytest.raises(DeploymentError, match="must not be deployed"):
        check_parity(converted, compiled, inputs)


def test_images_that_lie_otherwise_in_memory_do_not_compile_the_model_again(
    reconstructed: Reconstructed, network: Network
) -> None:
    _, inputs = network("chain")
    gray = inputs[:, :1].expand(-1, 3, -1, -1)
    compiled = compile_frozen(convert(reconstructed("chain")), gray[:1])
    with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile"):
        for image in (gray[1:2], gray[1:2].contiguous(), gray[1:2].to(memory_format=torch.channels_last)):
            compiled(image)


@pytest.mark.slow
@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_structure_compiles_to_what_was_evaluated(
    reconstructed: Reconstructed, network: Network, name: str, bits: int
) -> None:
    _, inputs = network(name)
    converted = convert(reconstructed(name, bits))
    prepare_for_kernels(converted)
    compiled, code = compiled_with_code(converted, inputs[:1])
    assert "torch.ops.onednn.qconv" in code
    check_parity(converted, compiled, inputs)


class Shifted(nn.Module):
    """The same classes, other values."""

    def __init__(self, model: nn.Module, shift: float) -> None:
        super().__init__()
        self.model, self.shift = model, shift

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.model(x) + self.shift
        return result


@pytest.fixture
def pair(network: Network) -> tuple[nn.Module, Tensor]:
    return network("chain")


def test_equal_models_pass(pair: tuple[nn.Module, Tensor]) -> None:
    model, inputs = pair
    parity = check_parity(model, model, inputs)
    assert parity.agreement == 1.0
    assert max(parity.in_range, parity.out_of_range) < 1e-5  # batches of one against one batch


def test_the_deviation_is_a_share_of_the_outputs_range(pair: tuple[nn.Module, Tensor]) -> None:
    model, inputs = pair
    with torch.no_grad():
        outputs = model(inputs)
    spread = float(outputs.max() - outputs.min())
    assert check_parity(model, Shifted(model, 0.005 * spread), inputs).in_range == pytest.approx(0.005, rel=1e-3)


@torch.no_grad()
def test_a_class_that_is_masked_out_hides_no_difference() -> None:
    torch.manual_seed(0)
    model, other = nn.Linear(10, 20), nn.Linear(10, 20)
    inputs = torch.randn(32, 10)
    plain = difference(other(inputs), model(inputs))
    for masked in (model, other):
        masked.bias[0] = -1e4
    with pytest.raises(DeploymentError, match="differs from the evaluated one"):
        check_parity(model, other, inputs)
    assert difference(other(inputs), model(inputs)).rms > plain.rms / 10


@pytest.mark.parametrize("factor", [0.05, float("nan"), float("inf")])
def test_a_model_that_differs_is_refused(pair: tuple[nn.Module, Tensor], factor: float) -> None:
    model, inputs = pair
    with torch.no_grad():
        outputs = model(inputs)
    shift = factor * float(outputs.max() - outputs.min())
    with pytest.raises(DeploymentError, match="differs from the evaluated one"):
        check_parity(model, Shifted(model, shift), inputs)


@pytest.mark.parametrize("wrong", [1.0, float("nan")])
def test_a_model_that_differs_only_beyond_the_calibrated_range_is_refused(pair: tuple[nn.Module, Tensor], wrong: float) -> None:
    model, inputs = pair
    limit = float(inputs.abs().max())

    def deployed(x: Tensor) -> Tensor:
        outputs: Tensor = model(x)
        return outputs + wrong * outputs.abs().max() if float(x.abs().max()) > limit else outputs

    with pytest.raises(DeploymentError, match="differs from the evaluated one"):
        check_parity(model, deployed, inputs)


def test_a_model_that_cannot_be_compiled_is_our_failure(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[nn.Module, Tensor]
) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("no such kernel")

    with pytest.raises(DeploymentError, match="cannot be compiled: ValueError: no such kernel"):
        compile_frozen(Broken(), pair[1][:1])


def test_of_a_failed_compilation_the_first_error_is_told(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[nn.Module, Tensor]
) -> None:
    def failing(*args: object, **kwargs: object) -> None:
        raise AssertionError

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", failing)
    with pytest.raises(
        DeploymentError, match=r"cannot be compiled: AssertionError: test_inductor\.py, line \d+: raise AssertionError$"
    ):
        compile_frozen(pair[0], pair[1][:1])


def test_an_error_without_a_place_is_told_by_its_name(monkeypatch: pytest.MonkeyPatch, pair: tuple[nn.Module, Tensor]) -> None:
    def failing(*args: object, **kwargs: object) -> None:
        raise RuntimeError("outer") from AssertionError()

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", failing)
    with pytest.raises(DeploymentError, match=r"cannot be compiled: AssertionError: $"):
        compile_frozen(pair[0], pair[1][:1])


def test_of_the_cpp_compiler_its_first_error_is_told(monkeypatch: pytest.MonkeyPatch, pair: tuple[nn.Module, Tensor]) -> None:
    def failing(*args: object, **kwargs: object) -> None:
        command = subprocess.CalledProcessError(1, ["g++"])
        raise CppCompileError(["g++"], "In file a.cpp:\na.cpp:3: fatal error: Python.h: No such file\nstopped") from command

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", failing)
    with pytest.raises(DeploymentError, match=r"the C\+\+ compiler failed: a\.cpp:3: fatal error: Python\.h: No such file$"):
        compile_frozen(pair[0], pair[1][:1])
