"""What a figure is said to depend on."""

from __future__ import annotations

import pytest
import torch

from inc_clusterq import environment
from inc_clusterq.cpu import Cpu


@pytest.mark.parametrize(("flags", "tiles"), [({"amx_int8"}, True), ({"avx512_vnni"}, False)])
def test_figures_of_two_processors_are_told_apart(monkeypatch: pytest.MonkeyPatch, flags: set[str], tiles: bool) -> None:
    monkeypatch.setattr(environment, "cpu", lambda: Cpu("Fast 9000", "x86_64", frozenset(flags)))
    found = environment.environment({"host": "1.0"})
    assert (found["processor"], found["host"]) == ("Fast 9000", "1.0")
    assert found["instruction set"].endswith(" and AMX") == tiles


@pytest.mark.parametrize(("available", "named"), [(True, {"gpu": "Faster 9000"}), (False, {})])
def test_a_gpu_is_named_where_there_is_one(monkeypatch: pytest.MonkeyPatch, available: bool, named: dict[str, str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Faster 9000")
    assert {key: value for key, value in environment.environment({}).items() if key == "gpu"} == named


def test_packages_that_are_not_installed_have_no_version() -> None:
    assert list(environment.installed("not-there", "torch", "nor-this")) == ["torch"]
