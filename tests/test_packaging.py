from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

LINKS = {"strategies": "../strategies", "adaptors": "../adaptors"}


@pytest.fixture
def project(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text())


def test_the_listed_packages_are_the_folders_with_an_init(root: Path, project: dict[str, Any]) -> None:
    package = root / "inc_clusterq"
    folders = [file.parent for file in package.rglob("__init__.py")] + [package / link for link in LINKS]
    folders += [folder for link in LINKS for folder in (package / link).rglob("*") if (folder / "__init__.py").is_file()]
    found = {".".join(folder.relative_to(root).parts) for folder in folders}
    assert set(project["tool"]["setuptools"]["packages"]) == found


@pytest.mark.parametrize("name", LINKS)
def test_the_top_level_folders_are_linked_relatively_and_mapped(root: Path, project: dict[str, Any], name: str) -> None:
    link = root / "inc_clusterq" / name
    assert link.is_symlink()
    assert str(link.readlink()) == LINKS[name]
    assert link.resolve() == root / name
    assert (link / "__init__.py").is_file()
    assert project["tool"]["setuptools"]["package-dir"][f"inc_clusterq.{name}"] == name
    assert [part for part in (root / name).iterdir() if part.is_dir() and part.name != "__pycache__"] == []


def test_no_folder_of_tests_is_a_package(root: Path) -> None:
    assert list((root / "tests").rglob("__init__.py")) == []


@pytest.mark.slow
def test_a_wheel_built_from_the_sdist_holds_every_module_and_the_type_marker(root: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    for name in ("inc_clusterq", "strategies", "adaptors"):
        shutil.copytree(root / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))

    sdist = build("sdist", source, tmp_path)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    wheel = build("wheel", unpacked, tmp_path)

    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("inc_clusterq/")}
    package = root / "inc_clusterq"
    modules = {file.relative_to(root) for file in package.rglob("*.py")}
    modules |= {file.relative_to(root) for link in LINKS for file in (package / link).glob("*.py")}
    templates = {file.relative_to(root) for file in package.rglob("*.html")}
    assert packed == {str(file) for file in modules | templates} | {"inc_clusterq/py.typed"}


def build(kind: str, source: Path, target: Path) -> Path:
    """Build with the declared back end, in this environment: no network is needed."""
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(target)], cwd=source, capture_output=True, text=True, check=True)
    return target / done.stdout.splitlines()[-1]
