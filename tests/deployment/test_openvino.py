from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from inc_clusterq.deployment import openvino as target
from inc_clusterq.deployment.inductor import check_parity
from inc_clusterq.deployment.operators import fallbacks
from inc_clusterq.deployment.saved import SavedModel
from inc_clusterq.errors import MissingDependencyError, ResultError

SavedResult = Callable[..., SavedModel]


@pytest.mark.parametrize(
    ("name", "bits", "weighted"), [("residual", 4, 6), ("depthwise", 8, 6), ("concat", 4, 8), ("signal", 4, 8)]
)
def test_it_runs_in_int8_and_computes_what_was_evaluated(
    saved: SavedResult, tmp_path: Path, name: str, bits: int, weighted: int
) -> None:
    model = saved(name, bits)
    target.export(model.module, tmp_path)
    operators = target.operators(model.module, tmp_path)
    found = [operator for operator in operators if operator.kind in ("convolution", "linear")]
    assert [operator.precision for operator in found] == ["int8"] * weighted
    assert not [operator for operator in fallbacks(operators) if operator.kind in ("convolution", "linear")]
    inputs = torch.randn(24, *model.shape, generator=torch.Generator().manual_seed(3))
    assert check_parity(model.module, target.load(tmp_path), inputs).agreement >= 0.95
    assert target.load(tmp_path)(inputs).shape == (24, 5)  # the batch dimension is free


def test_a_linear_operator_as_wide_as_a_convolution_leaves_both_in_int8(saved: SavedResult, tmp_path: Path) -> None:
    """OpenVINO computes in float what reads a constant of zero points that the two share."""
    model = saved("attentive", 8)
    target.export(model.module, tmp_path)
    operators = target.operators(model.module, tmp_path)
    weighted = {found.name: found.precision for found in operators if found.kind in ("convolution", "linear")}
    assert weighted == dict.fromkeys(("stem.0", "query", "local_token_mix.0", "squeeze", "excite", "fc"), "int8")
    assert not [found for found in operators if found.kernel == "not found"]


def test_a_missing_run_time_is_named_with_its_extra(
    saved: SavedResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingDependencyError, match=r"openvino.*inc-clusterq\[openvino\]"):
        target.export(saved("residual").module, tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match=r"holds no model\.xml"):
        target.load(tmp_path)
