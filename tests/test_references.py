from __future__ import annotations

import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from inc_clusterq.errors import DatasetError, ModelError
from inc_clusterq.references import REFERENCE_PATTERN, call_reference


def test_a_function_next_to_the_yaml_is_called(tmp_path: Path, write_module: Callable[[str], str]) -> None:
    helper = write_module("VALUE = 41")
    name = write_module(f"def answer():\n    import {helper}\n    return {helper}.VALUE + 1")
    path = list(sys.path)
    assert call_reference(f"python:{name}:answer", tmp_path, ModelError) == 42
    assert sys.path == path


def test_a_function_of_an_installed_package_is_called(tmp_path: Path) -> None:
    assert call_reference("python:platform:python_version", tmp_path, ModelError) == platform.python_version()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "import torhc\ndef net(): ...",
            "imported: ModuleNotFoundError: No module named 'torhc' (NAME.py, line 1)",
        ),
        ("x = 1\ny = z\ndef net(): ...", "cannot be imported: NameError: name 'z' is not defined (NAME.py, line 2)"),
        ("def net(:\n    pass", "cannot be imported: SyntaxError: invalid syntax (NAME.py, line 1)"),
        ("def nett(): ...", "has no function 'net'; did you mean 'nett'?"),
        ("net = 3", "has no function 'net'"),
        ("def net():\n    raise ValueError('too\\n wide')", "net() failed: ValueError: too wide (NAME.py, line 2)"),
        ("import sys\ndef net():\n    sys.exit(0)", "net() failed: SystemExit: 0 (NAME.py, line 3)"),
        ("import sys\nsys.exit('no')", "cannot be imported: SystemExit: no (NAME.py, line 2)"),
        (
            "def net():\n    return int(1, 2, 3)",
            "net() failed: TypeError: int() takes at most 2 arguments (3 given) (NAME.py, line 2)",
        ),
    ],
)
def test_the_users_own_failure_is_shown_with_its_last_line(
    tmp_path: Path, write_module: Callable[[str], str], source: str, message: str
) -> None:
    name = write_module(source)
    path = list(sys.path)
    with pytest.raises(DatasetError) as raised:
        call_reference(f"python:{name}:net", tmp_path, DatasetError)
    assert message.replace("NAME", name) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert sys.path == path


def test_what_it_makes_the_default_dtype_stays_with_it(tmp_path: Path, write_module: Callable[[str], str]) -> None:
    set_double = "torch.set_default_dtype(torch.float64)"
    name = write_module(f"import torch\n{set_double}\ndef number():\n    {set_double}\n    return torch.ones(())")
    assert call_reference(f"python:{name}:number", tmp_path, ModelError).dtype == torch.float64
    assert torch.get_default_dtype() == torch.float32


def test_a_function_that_needs_arguments_is_told_which(tmp_path: Path, write_module: Callable[[str], str]) -> None:
    name = write_module("def net(width, depth=3, **others): return width")
    with pytest.raises(ModelError, match=r"net\(\) is called without arguments and needs width; name a function that passes"):
        call_reference(f"python:{name}:net", tmp_path, ModelError)


def test_a_module_that_is_not_there_is_named_with_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=re.escape(f"there is no module 'not_there' in {tmp_path}")):
        call_reference("python:not_there.nets:net", tmp_path, ModelError)


def test_a_module_named_as_a_file_is_told_from_one_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "zoo_of_nets.py").write_text("def net(): ...")
    with pytest.raises(ModelError, match=r"there is no module 'zoo_of_nets\.py' in .*; write its name without \.py"):
        call_reference("python:zoo_of_nets.py:net", tmp_path, ModelError)


def test_a_file_with_the_name_of_an_imported_module_is_not_silently_passed_over(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("def net(): ...")
    with pytest.raises(ModelError, match=r"another module 'json' .* is already imported"):
        call_reference("python:json:net", tmp_path, ModelError)


@pytest.mark.parametrize("text", ["python:net", "python:a-b:n", "python:a.b:n()", "python::n", "a.b:n", "python:.a:b"])
def test_the_pattern_of_references_takes_nothing_else(text: str) -> None:
    assert not re.match(REFERENCE_PATTERN, text)
    assert re.match(REFERENCE_PATTERN, "python:a.b:net")
