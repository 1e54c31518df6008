"""What the generated parts of the docs are made of: rows, cells, and the conditions below a table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [row(headings), row(["---"] * len(headings)), *map(row, rows)]


def row(cells: Sequence[str]) -> str:
    """One line of a table."""
    return "| " + " | ".join(cells) + " |"


def cell(values: Sequence[float], digits: int = 2) -> str:
    """Mean and standard deviation over seeds; the bare value where there is one only, a dash where there is none."""
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def unfinished(record: dict[str, Any]) -> list[str]:
    """Paths to figures that not every seed has; those that no seed has were not measured."""
    seeds = len(record["seeds"])

    def below(value: Any, path: tuple[str, ...]) -> list[str]:
        if isinstance(value, dict):
            return [found for key, inner in value.items() if key != "seeds" for found in below(inner, (*path, str(key)))]
        figures = isinstance(value, list) and not any(isinstance(entry, str) for entry in value)
        return [" / ".join(path)] if figures and len(value) not in (0, seeds) else []

    return below(record, ())


def conditions(record: dict[str, Any]) -> list[str]:
    """What the figures of a record depend on, and the call that repeats them."""
    seeds = ", ".join(map(str, record["seeds"]))
    return [
        f"{record['images']} calibration images; preset `{record['preset']}`; seeds {seeds}; {environment(record)}.",
        "",
        f"`{record['command']}`",
        "",
    ]


def made_by(record: dict[str, Any]) -> list[str]:
    """The same for a record without calibration images."""
    return ["", f"{environment(record)}.", "", f"`{record['command']}`", ""]


def environment(record: dict[str, Any]) -> str:
    """Versions and machine, or which seeds were measured on which, in words."""
    seeds: dict[str, list[str]] = {}
    for seed, machine in zip(record.get("seeds", ()), record.get("machines", ()), strict=False):
        seeds.setdefault(_in_words(machine), []).append(str(seed))
    machines = [f"seeds {', '.join(of_machine)} on {machine}" for machine, of_machine in seeds.items()]
    return "; ".join([_in_words(record["environment"]), *machines])


def _in_words(names: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in names.items())
