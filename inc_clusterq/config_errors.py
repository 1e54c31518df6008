"""What is wrong with a configuration, said in the words of the YAML: line, key, value, what is allowed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from difflib import get_close_matches
from typing import get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from inc_clusterq.yaml_file import KeyPath, YamlFile

CLOSE, LIKE = 0.8, 0.6  # of two keys, as difflib has it: a slip of the finger, and its own default
SHOWN = 3  # places of a key that several mappings have


def explain(error: ValidationError, file: YamlFile, schema: type[BaseModel]) -> str:
    """All problems of one file in one message, in the order of its lines."""
    told: dict[KeyPath, str] = {}
    for detail in error.errors(include_url=False):
        at = _place(tuple(str(part) for part in detail["loc"]), detail["type"], schema)
        problem = _problem(detail, at, schema)
        another_kind = problem.partition("; it should be ")[2] if at in told else ""
        told[at] = f"{told[at]} or {another_kind}" if another_kind else told.get(at, problem)
    problems: list[tuple[int, str]] = []
    for at, problem in told.items():
        line = next((file.lines[at[:n]] for n in range(len(at), 0, -1) if at[:n] in file.lines), 0)
        where = f"line {line}: " if line else ""
        problems.append((line, f"{where}{'.'.join(at)}{problem}"))
    if len(problems) == 1:
        return f"{file.path}, {problems[0][1]}"
    return "\n  ".join([f"{file.path} has {len(problems)} problems:", *(text for _, text in sorted(problems))])


def sections(schema: type[BaseModel], at: KeyPath = ()) -> Iterator[tuple[KeyPath, type[BaseModel]]]:
    """Every mapping of the schema with the keys that lead to it; `NAME` stands for a key of the user's own."""
    yield at, schema
    for key, field in keys(schema).items():
        inner, free_keys = _section_of(field)
        if inner is not None:
            yield from sections(inner, (*at, key, "NAME") if free_keys else (*at, key))


def keys(schema: type[BaseModel]) -> dict[str, FieldInfo]:
    """The keys of one mapping as they stand in the YAML."""
    return {field.alias or name: field for name, field in schema.model_fields.items()}


def _section_of(field: FieldInfo) -> tuple[type[BaseModel] | None, bool]:
    """The model behind a field, and whether the field maps free keys to that model."""
    kinds = (field.annotation, *get_args(field.annotation))
    models = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return (models[0] if models else None), get_origin(field.annotation) is dict


def _place(at: KeyPath, kind: str, schema: type[BaseModel]) -> KeyPath:
    """Where a problem is in terms of the YAML: without the kinds of value that a key may have, one of which was tried."""
    for length in range(1, len(at)):
        field = _field(at[:length], schema)
        if field is not None and _section_of(field)[0] is None:  # below it there are no keys
            inner = () if kind == "missing" else tuple(part for part in at[length:] if part.isdigit())
            return at[:length] + inner
    return at[:-1] if at and at[-1] == "[key]" else at


def _problem(detail: ErrorDetails, at: KeyPath, schema: type[BaseModel]) -> str:
    kind, value = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        return f": unknown key; {_nearest(at, schema)}"
    if kind == "missing" and at != detail["loc"]:
        return ": has too few values"
    if kind == "missing":
        return ": is missing; " + _purpose(at, schema)
    if kind == "value_error":
        return f": {detail['ctx']['error']}" + ("" if isinstance(value, dict) else f" (it is {json.dumps(value)})")
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        if value is None:
            return ": is empty; give it keys or delete it"
        return f": {json.dumps(value)} is not a mapping of keys to values"
    if kind in ("string_pattern_mismatch", "string_type") and (field := _field(at, schema)) is not None and field.examples:
        forms = " or ".join(map(json.dumps, field.examples))
        return f": {json.dumps(value)} is not allowed; it should look like {forms} ({field.description})"
    allowed = detail["msg"].replace("Input should", "it should").replace("String should", "it should")
    allowed = allowed.replace("a valid array", "a list")  # as YAML calls it
    return f": {json.dumps(value)} is not allowed; {allowed}"


def _section_at(at: KeyPath, schema: type[BaseModel]) -> type[BaseModel] | None:
    return next((found for path, found in sections(schema) if _leads_to(path, at)), None)


def _leads_to(pattern: KeyPath, at: KeyPath) -> bool:
    return len(pattern) == len(at) and all(one in ("NAME", other) for one, other in zip(pattern, at, strict=True))


def _nearest(at: KeyPath, schema: type[BaseModel]) -> str:
    """The known key that the user may have meant: much like it in the same mapping, so elsewhere, or a little like it here."""
    section = _section_at(at[:-1], schema)
    here = list(keys(section)) if section is not None else []
    elsewhere: dict[str, list[str]] = {}
    for path, found in sections(schema):
        for key in keys(found):
            elsewhere.setdefault(key, []).append(".".join((*path, key)))
    known = {key: [".".join((*at[:-1], key))] for key in here}
    for candidates, likeness in ((known, CLOSE), (elsewhere, CLOSE), (known, LIKE)):
        if near := get_close_matches(at[-1], candidates, 1, likeness):
            return f"did you mean {' or '.join(map(repr, candidates[near[0]][:SHOWN]))}?"
    return f"known keys here: {', '.join(here)}"


def _field(at: KeyPath, schema: type[BaseModel]) -> FieldInfo | None:
    section = _section_at(at[:-1], schema)
    return keys(section).get(at[-1]) if section is not None else None


def _purpose(at: KeyPath, schema: type[BaseModel]) -> str:
    field = _field(at, schema)
    return field.description or "" if field is not None else ""
