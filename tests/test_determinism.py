"""What holds inside `repeatable`, and only there."""

from __future__ import annotations

import os

import pytest
import torch

from inc_clusterq.determinism import CUBLAS, deterministic, repeatable


@pytest.mark.parametrize("mode", ["default", "error"])
def test_with_a_gpu_kernels_sum_in_a_fixed_order_inside_and_as_before_outside(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv(CUBLAS[0], "as before")  # which comes back after the test
    monkeypatch.delenv(CUBLAS[0])
    usual = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode(mode)
    before = torch.get_deterministic_debug_mode()
    try:
        with repeatable():
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.is_deterministic_algorithms_warn_only_enabled()
            assert os.environ[CUBLAS[0]] == CUBLAS[1]
            assert not deterministic.fill_uninitialized_memory
        assert torch.get_deterministic_debug_mode() == before
        assert deterministic.fill_uninitialized_memory
    finally:
        torch.set_deterministic_debug_mode(usual)


def test_without_one_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = torch.get_deterministic_debug_mode()
    with repeatable():
        assert torch.get_deterministic_debug_mode() == before
