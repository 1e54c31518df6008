"""Reading a YAML file so that every later complaint can name the line it is about.

Plain data only (the safe loader), with four differences from `yaml.safe_load`: a key that stands twice in one mapping is an
error instead of silently losing the first; keys are text as it stands, since layers have names such as 0.10; `1e-3` and
`2.5e3` are numbers, as in YAML 1.2, instead of text; and `010` and `12:30` are refused, which YAML 1.2 takes for others.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from inc_clusterq.errors import ConfigError

KeyPath = tuple[str, ...]
NUMBERS = {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"}
MERGE, TEXT = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:str"  # what a node is


@dataclass(frozen=True)
class YamlFile:
    """The data of one file and the line, counted from 1, on which each key path stands."""

    path: Path
    data: dict[str, Any]
    lines: dict[KeyPath, int]


class _Loader(yaml.SafeLoader):
    pass


_NUMBER = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")
_OLD_NUMBER = re.compile(r"^[-+]?(0[0-7_]+$|[0-9][0-9_]*:)")
_SURROGATE = re.compile("[\ud800-\udfff]")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))


def read_yaml(path: Path) -> YamlFile:
    """Read a file that holds one mapping; ConfigError for everything that can be wrong with that."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not a text file in UTF-8 (byte {error.start})") from error

    lines: dict[KeyPath, int] = {}
    repeated: list[str] = []
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        _walk(node, (), [], lines, repeated)
        data = None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {_syntax(error)}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: its lists and mappings stand in each other too deeply to be read") from error
    except ValueError as error:  # a date such as 2026-02-31
        raise ConfigError(f"{path}: holds a value that YAML cannot read: {error}") from error
    if repeated:
        raise ConfigError(f"{path}: " + "; ".join(repeated))
    if not isinstance(data, dict):
        found = "is empty" if data is None else f"holds {_kind(data)}"
        raise ConfigError(f"{path}: {found}; it must hold keys and values, beginning with `model:`")
    return YamlFile(path, data, lines)


def _walk(
    node: yaml.Node | None, at: KeyPath, ancestors: list[yaml.Node], lines: dict[KeyPath, int], repeated: list[str]
) -> None:
    if any(node is ancestor for ancestor in ancestors):
        raise yaml.MarkedYAMLError(problem=f"{'.'.join(at)} contains itself", problem_mark=node.start_mark if node else None)
    if isinstance(node, yaml.ScalarNode):
        _refuse_misread(node)
    if isinstance(node, yaml.SequenceNode):
        for position, item in enumerate(node.value):
            _walk(item, (*at, str(position)), [*ancestors, node], lines, repeated)
    if not isinstance(node, yaml.MappingNode):
        return
    here: dict[str, int] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="a key must be a plain word", problem_mark=key.start_mark)
        line, path = key.start_mark.line + 1, (*at, key.value)
        if key.value in here:
            repeated.append(f"key {'.'.join(path)} stands twice, on line {here[key.value]} and on line {line}")
        here[key.value] = lines[path] = line
        if key.tag != MERGE:
            key.tag = TEXT
        _walk(value, path, [*ancestors, node], lines, repeated)


def _refuse_misread(node: yaml.ScalarNode) -> None:
    problem = ""
    if "\0" in node.value:
        problem = "a text holds the character NUL, which no name can"
    elif _SURROGATE.search(node.value):
        problem = "a text holds half a character (\\ud800 to \\udfff), which no file can"
    elif node.tag in NUMBERS and _OLD_NUMBER.match(node.value):
        problem = f"{node.value} is a number to base 8 or 60 in YAML; write it plainly, or in quotes where it is text"
    if problem:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _syntax(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    problem = getattr(error, "problem", None) or " ".join(str(error).split())
    context = getattr(error, "context", None)
    return f"{where}not valid YAML: {problem}" + (f" ({context})" if context else "")


def _kind(data: object) -> str:
    return "a list" if isinstance(data, list) else f"only {data!r}"
