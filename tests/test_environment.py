"""What a figure is said to depend on."""

from __future__ import annotations

import pytest

from inc_clusterq import environment
from inc_clusterq.cpu import Cpu


@pytest.mark.parametrize(("flags", "tiles"), [({"amx_int8"}, True), ({"avx512_vnni"}, False)])
def test_figures_of_two_processors_are_told_apart(monkeypatch: pytest.MonkeyPatch, flags: set[str], tiles: bool) -> None:
    monkeypatch.setattr(environment, "cpu", lambda: Cpu("Fast 9000", "x86_64", frozenset(flags)))
    found = environment.environment({"host": "1.0"})
    assert (found["processor"], found["host"]) == ("Fast 9000", "1.0")
    assert found["instruction set"].endswith(" and AMX") == tiles


def test_packages_that_are_not_installed_have_no_version() -> None:
    assert list(environment.installed("not-there", "torch", "nor-this")) == ["torch"]
