from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from inc_clusterq.deployment.inductor_operators import compile_and_list
from inc_clusterq.deployment.operators import (
    Operator,
    fallbacks,
    require_int8,
    source_operators,
    summary,
)
from inc_clusterq.deployment.saved import SavedModel
from inc_clusterq.errors import DeploymentError

SavedResult = Callable[..., SavedModel]


def test_the_saved_program_tells_its_operators_by_the_users_names(saved: SavedResult) -> None:
    found = source_operators(saved("residual").module)
    assert [(source.name, source.kind) for source in found if source.kind != "addition"] == [
        ("stem.0", "convolution"),
        ("one.conv1.0", "convolution"),
        ("one.conv2.0", "convolution"),
        ("two.conv1.0", "convolution"),
        ("two.conv2.0", "convolution"),
        ("pooling", "pooling"),
        ("fc", "linear"),
    ]
    additions = [source for source in found if source.kind == "addition"]
    assert [source.name for source in additions] == ["one.addition", "two.addition"]
    assert not any(source.quantizable for source in additions)  # they read an unrounded sum


def test_a_layer_that_is_called_twice_is_listed_twice(saved: SavedResult) -> None:
    names = [source.name for source in source_operators(saved("tied").module) if source.kind == "convolution"]
    assert names == ["stem.0", "a", "a (2)"]


@pytest.mark.parametrize(
    ("name", "bits"),
    [("residual", 4), pytest.param("depthwise", 8, marks=pytest.mark.slow), pytest.param("concat", 4, marks=pytest.mark.slow)],
)
def test_inductor_computes_every_convolution_and_linear_operator_in_int8(saved: SavedResult, name: str, bits: int) -> None:
    model = saved(name, bits)
    compiled, operators = compile_and_list(model.module, torch.zeros(1, *model.shape))
    assert compiled(torch.zeros(1, *model.shape)).shape == (1, 5)
    assert len(operators) == len(source_operators(model.module))
    convolutions = [found for found in operators if found.kind == "convolution"]
    assert all(found.kernel.startswith("onednn.q") for found in convolutions)
    (fallen,) = fallbacks(operators)
    assert fallen.name == "fc"  # 16 inputs, 5 outputs
    assert "at most 16 inputs" in fallen.reason


def test_a_linear_operator_runs_in_int8_where_it_is_not_tiny(saved: SavedResult) -> None:
    model = saved("residual", 8)
    _, operators = compile_and_list(model.module, torch.zeros(2, *model.shape))
    assert fallbacks(operators) == []
    assert operators[-1].kernel == "onednn.qlinear_pointwise"


def test_what_the_host_leaves_in_float_is_a_fallback_and_strict_names_it(saved: SavedResult) -> None:
    model = saved("transposed")
    _, operators = compile_and_list(model.module, torch.zeros(1, *model.shape))
    assert [(fallen.name, fallen.precision) for fallen in fallbacks(operators)] == [("up", "float"), ("fc", "float")]
    assert "in float: up, fc" in summary(operators)
    with pytest.raises(DeploymentError, match=r"2 operator\(s\) in float: up .*the host's quantizer leaves"):
        require_int8(operators, "inductor")


def test_a_fused_addition_does_not_let_two_convolutions_change_their_names(saved: SavedResult) -> None:
    model = saved("beside", 8)
    _, operators = compile_and_list(model.module, torch.zeros(1, *model.shape))
    convolutions = {found.name: found.precision for found in operators if found.kind == "convolution"}
    assert convolutions == {"stem.0": "int8", "a": "int8", "up": "float", "b": "int8"}


def test_a_layer_that_is_called_twice_runs_in_int8_both_times(saved: SavedResult) -> None:
    model = saved("tied", 8)
    _, operators = compile_and_list(model.module, torch.zeros(1, *model.shape))
    assert [found.precision for found in operators if found.kind == "convolution"] == ["int8"] * 3


def test_transposed_convolutions_of_any_dimension_are_listed() -> None:
    for layer, shape in ((nn.ConvTranspose1d, (9,)), (nn.ConvTranspose2d, (9, 9)), (nn.ConvTranspose3d, (5, 5, 5))):
        program = torch.export.export(layer(3, 4, 2), (torch.zeros(1, 3, *shape),)).module()
        assert isinstance(program, fx.GraphModule)
        assert [(found.kind, found.quantizable) for found in source_operators(program)] == [("convolution", True)]


def test_without_freezing_the_list_says_that_everything_is_in_float(
    saved: SavedResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trap that the list is there for."""

    def compile_thawed(module: torch.nn.Module, example: torch.Tensor) -> object:
        torch.compiler.reset()
        with torch.no_grad():
            compiled = torch.compile(module, dynamic=False)
            compiled(example)
        return compiled

    monkeypatch.setattr("inc_clusterq.deployment.inductor_operators.compile_frozen", compile_thawed)
    model = saved("chain")
    _, operators = compile_and_list(model.module, torch.zeros(1, *model.shape))
    assert {found.kind for found in fallbacks(operators)} >= {"convolution", "linear"}


def test_the_summary_counts_by_kind() -> None:
    operators = [
        Operator("a", "convolution", True, "int8", "k"),
        Operator("b", "convolution", True, "float", "k", "why"),
        Operator("c", "addition", True, "fused", "k"),
        Operator("d", "addition", False, "float", "k", "not counted"),
    ]
    assert summary(operators) == "in int8: 1 of 2 convolutions, 1 of 1 additions; in float: b"
    assert summary([]) == "nothing is quantized"
