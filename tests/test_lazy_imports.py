from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import inc_clusterq
from inc_clusterq.inputs import InputSpec

HEAVY = ("neural_compressor", "torchvision", "torchao", "torch", "sklearn", "pydantic", "matplotlib")


def imported_by(statement: str, root: Path) -> set[str]:
    """Which of the heavy packages a fresh process has imported after `statement`."""
    code = f"{statement}\nimport sys\nprint(*(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_package_itself_imports_nothing_heavy(root: Path) -> None:
    assert imported_by("import inc_clusterq", root) == set()


def test_help_imports_nothing_heavy(root: Path) -> None:
    assert imported_by("import inc_clusterq.cli", root) == set()


@pytest.mark.parametrize("module", ["config", "models", "registry", "inputs"])
def test_a_job_is_read_without_host_or_torchvision(root: Path, module: str) -> None:
    assert imported_by(f"import inc_clusterq.{module}", root) <= {"torch", "pydantic"}


def test_a_job_starts_without_the_library_that_draws_figures(root: Path) -> None:
    assert "matplotlib" not in imported_by("import inc_clusterq.pipeline, inc_clusterq.synthetic_set", root)


def test_public_names_are_handed_on() -> None:
    assert inc_clusterq.InputSpec is InputSpec
    assert dir(inc_clusterq) == sorted(inc_clusterq.__all__)
    for name in inc_clusterq.__all__:
        assert getattr(inc_clusterq, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'ClusterQ'"):
        _ = inc_clusterq.ClusterQ
