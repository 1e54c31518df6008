"""Join records of one benchmark that several processes made side by side: other seeds, networks, sources or methods each.

All must be of this version and the same call but for these. What two of them have both measured must be the same. Seeds may
come from several machines, one seed from one only, so that methods and sources are compared on the same; `machines` tells.

    python benchmarks/join.py PART.json PART.json ... --json docs/figures/NAME.json
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from page import unfinished

LISTED = ("--nets", "--widths", "--sources", "--methods", "--presets")  # of which one record may have what another lacks
OWN = (*LISTED, "--seeds", "--json")  # arguments in which calls of one record may differ
CONDITIONS = ("preset", "limit", "images")  # which equal calls have in common
MACHINE = ("processor", "instruction set", "processors")  # of the environment, in which seeds may differ


def main() -> None:
    """Read the parts, and write the whole."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", type=Path, help="records")
    parser.add_argument("--json", type=Path, required=True, help="file for the whole")
    given = parser.parse_args()
    try:
        whole = joined([_read(part) for part in given.parts], str(given.json))
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    given.json.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


def joined(records: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """One record of all seeds, in order, as the call in its `command` would have written it to the file `name`.

    Raises:
        ValueError: the records do not belong together, or a seed lacks what another has.
    """
    first = records[0]
    for record in records:
        if "seeds" not in record:
            raise ValueError(f"{record.get('command', 'one of the files')} is no call with seeds, and can't be joined")
        _merged(_without_machine(first), _without_machine(record), "environment")
        _merged(_call(first), _call(record), "call")
    by_seed: dict[int, dict[str, Any]] = {}
    for record in records:
        for position, seed in enumerate(record["seeds"]):
            of_seed = _of_seed({**record, "machines": _machines(record)}, position)
            by_seed[seed] = _merged(by_seed.get(seed, {}), of_seed, f"seed {seed}")
    seeds = sorted(by_seed)
    figures = _stacked([by_seed[seed] for seed in seeds])
    machines = figures.pop("machines")
    several = any(machine != machines[0] for machine in machines)
    where = {"environment": _without_machine(first), "machines": machines} if several else {"environment": first["environment"]}
    head = {key: first[key] for key in CONDITIONS if key in first}
    command = _command([record["command"] for record in records], seeds, name)
    whole = {"command": command, **where, **head, "seeds": seeds, **figures}
    if missing := unfinished(whole):
        raise ValueError(f"not every seed has {missing[0]}")
    return whole


def _read(file: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no record: {error}") from error
    return record


def _without_machine(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record["environment"].items() if key not in MACHINE}


def _machines(record: dict[str, Any]) -> list[dict[str, str]]:
    """The machine of each seed."""
    machine = {key: value for key, value in record["environment"].items() if key in MACHINE}
    machines: list[dict[str, str]] = record.get("machines", [machine] * len(record["seeds"]))
    return machines


def _of_seed(record: dict[str, Any], position: int) -> dict[str, Any]:
    """The figures of one seed, each a list of one."""

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cut(inner) for key, inner in value.items()}
        return value[position : position + 1] if isinstance(value, list) else value

    return {key: cut(value) for key, value in record.items() if key not in ("command", "environment", "seeds", *CONDITIONS)}


def _merged(one: Any, other: Any, where: str) -> Any:
    """What either has.

    Raises:
        ValueError: they have different things in one place; `where` says where that is.
    """
    if isinstance(one, dict) and isinstance(other, dict):
        both = {key: _merged(one[key], other[key], f"{where} / {key}") for key in one if key in other}
        return {**one, **other, **both}
    if one == other or other == []:
        return one
    if one == []:
        return other
    raise ValueError(f"{where} is {one} in one record and {other} in another")


def _stacked(trees: Sequence[Any]) -> Any:
    """Lists of the seeds, one after the other; what is none is the same in all."""
    first = trees[0]
    if isinstance(first, dict):
        keys = dict.fromkeys(key for tree in trees for key in tree)
        return {key: _stacked([tree[key] for tree in trees if key in tree]) for key in keys}
    if isinstance(first, list):
        return [value for tree in trees for value in tree]
    for tree in trees:
        if tree != first:
            raise ValueError(f"{first} in one record is {tree} in another")
    return first


def _call(record: dict[str, Any]) -> str:
    """Script and arguments that all records must share."""
    words = shlex.split(record["command"])
    return shlex.join(word for word, before in zip(words, ["", *words], strict=False) if {word, before}.isdisjoint(OWN))


def _command(commands: Sequence[str], seeds: Sequence[int], name: str) -> str:
    words = shlex.split(commands[0])
    values = {"--seeds": map(str, seeds), "--json": [name], **{flag: _all_listed(commands, flag) for flag in LISTED}}
    for flag, listed in values.items():
        if flag in words:
            words[words.index(flag) + 1] = ",".join(dict.fromkeys(listed))
    return shlex.join(words)


def _all_listed(commands: Sequence[str], flag: str) -> Iterator[str]:
    for command in commands:
        words = shlex.split(command)
        if flag in words:
            yield from words[words.index(flag) + 1].split(",")


if __name__ == "__main__":
    main()
