from __future__ import annotations

from pathlib import Path

import pytest

from inc_clusterq.errors import ConfigError
from inc_clusterq.yaml_file import read_yaml


def write(folder: Path, text: str) -> Path:
    file = folder / "job.yaml"
    file.write_text(text)
    return file


def test_every_key_path_is_known_with_its_line(tmp_path: Path) -> None:
    file = read_yaml(write(tmp_path, "model:\n  input: {shape: [1]}\n\nbits: W4A8\n"))
    assert file.data == {"model": {"input": {"shape": [1]}}, "bits": "W4A8"}
    assert file.lines == {("model",): 1, ("model", "input"): 2, ("model", "input", "shape"): 2, ("bits",): 4}


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1e-03"])
def test_an_exponent_without_a_dot_is_a_number(tmp_path: Path, text: str) -> None:
    assert read_yaml(write(tmp_path, f"rate: {text}")).data == {"rate": 0.001}


@pytest.mark.parametrize("text", ["2.5e3", "+2.5E3", "2500.e0", ".25e4", "25e+2"])
def test_an_exponent_needs_no_sign(tmp_path: Path, text: str) -> None:
    assert read_yaml(write(tmp_path, f"rate: {text}")).data == {"rate": 2500.0}


@pytest.mark.parametrize("text", ["e3", ".e3", "2.5e", "W4e3"])
def test_what_only_looks_like_a_number_is_text(tmp_path: Path, text: str) -> None:
    assert read_yaml(write(tmp_path, f"rate: {text}")).data == {"rate": text}


def test_a_merged_mapping_is_no_repeated_key(tmp_path: Path) -> None:
    file = read_yaml(write(tmp_path, "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n"))
    assert file.data["b"] == {"x": 1, "y": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("- a\n", "holds a list"),
        ("hello", "holds only 'hello'"),
        ("a: 1\nb: [1, 2\nc: 3\n", "line 3, column 2: not valid YAML: expected ',' or ']'"),
        ("a: {x: 1}\nb: 1\na: 2\n", "key a stands twice, on line 1 and on line 3"),
        ("a:\n  x: 1\n  x: 2\n", "key a.x stands twice, on line 2 and on line 3"),
        (
            "a: !!python/object/apply:os.system [ls]\n",
            "line 1, column 4: not valid YAML: could not determine",
        ),
        ("a: &a\n  b: *a\n", "a.b contains itself"),
        ("? [1, 2]\n: 3\n", "a key must be a plain word"),
        ("a: 2026-02-31\n", "holds a value that YAML cannot read"),
        ("a: \x07\n", "not valid YAML"),
        ("a: " + "[" * 3000 + "]" * 3000 + "\n", "stand in each other too deeply"),
        ('a: "\\ud800"\n', "line 1, column 4: not valid YAML: a text holds half a character"),
        ("a: [010]\n", "line 1, column 5: not valid YAML: 010 is a number to base 8 or 60 in YAML; write it plainly"),
        ("a: 12:30\n", "12:30 is a number to base 8 or 60"),
        ('a: 1\nb: "x\\0"\n', "line 2, column 4: not valid YAML: a text holds the character NUL"),
    ],
)
def test_a_file_that_is_not_one_mapping_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read_yaml(write(tmp_path, text))
    assert str(raised.value).startswith(f"{tmp_path / 'job.yaml'}: ")
    assert message in str(raised.value)


def test_a_missing_file_a_folder_and_a_binary_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_yaml(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"a: \xff\xfe")
    with pytest.raises(ConfigError, match="not a text file"):
        read_yaml(binary)


def test_keys_are_text_whatever_they_look_like(tmp_path: Path) -> None:
    file = read_yaml(write(tmp_path, "2026-01-01: [{1: a}]\n2.5: b\n"))
    assert file.data == {"2026-01-01": [{"1": "a"}], "2.5": "b"}


def test_names_of_layers_that_look_like_numbers_stay_apart(tmp_path: Path) -> None:
    text = "{0.1: a, 0.10: b, 010: c, 1_0: d, 1e1: e, on: f, ~: g, 1:30: h}"
    names = ["0.1", "0.10", "010", "1_0", "1e1", "on", "~", "1:30"]
    file = read_yaml(write(tmp_path, f"layers: {text}\n"))
    assert list(file.data["layers"]) == names
    assert all(("layers", name) in file.lines for name in names)
