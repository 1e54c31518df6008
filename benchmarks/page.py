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


def conditions(record: dict[str, Any]) -> list[str]:
    """What the figures of a record depend on, and the call that repeats them."""
    seeds = ", ".join(map(str, record["seeds"]))
    environment = ", ".join(f"{name} {value}" for name, value in record["environment"].items())
    return [
        f"{record['images']} calibration images; preset `{record['preset']}`; seeds {seeds}; {environment}.",
        "",
        f"`{record['command']}`",
        "",
    ]
