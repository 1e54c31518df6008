"""Write the tables of the docs and the README from the figures that the other scripts here have recorded.

python benchmarks/tables.py            rewrite docs/accuracy.md, deployment.md, methods.md, sources.md and README.md
python benchmarks/tables.py --check    exit with status 1 if it is not what the figures say
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import synthesis_table
from deployment_table import FLOAT, HEADINGS, rows
from page import cell, conditions, environment, made_by, row, table, unfinished

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- written by benchmarks/tables.py -->", "<!-- end -->"
MEASURES = {
    "top1": "top 1",
    "output_error": "output error",
    "largest_loss": "largest loss",
    "largest_ratio": "largest ratio",
    "seconds": "seconds",
    "peak_mb": "peak MB",
}
DIGITS = {"output_error": 3}
SUMMARY = ("INC noise", "INC real", "ours, no data")  # columns of the README


def main() -> None:
    """Rewrite or check the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    records, deployed = _records("accuracy"), _records("deployment")
    pages = (
        (ROOT / "docs" / "accuracy.md", _sections(records)),
        (ROOT / "docs" / "deployment.md", _deployment(deployed)),
        (ROOT / "docs" / "methods.md", _reconstruction()),
        (ROOT / "docs" / "sources.md", synthesis_table.sections(*map(_records, ("synthesis", "presets", "teacher")))),
        (ROOT / "README.md", _summary(records)),
    )
    stale = False
    for page, body in pages:
        before = page.read_text(encoding="utf-8")
        after = between_marks(before, body)
        stale = stale or after != before
        if not check:
            page.write_text(after, encoding="utf-8")
    sys.exit(int(check and stale))


def _records(kind: str) -> list[dict[str, Any]]:
    files = sorted((ROOT / "docs" / "figures").glob(f"{kind}-*.json"), key=lambda file: file.stem)
    records = {file.name: json.loads(file.read_text(encoding="utf-8")) for file in files}
    for name, record in records.items():
        if "seeds" in record and (missing := unfinished(record)):
            sys.exit(f"{name} was cut off: not every seed has {missing[0]}; run its command again: {record['command']}")
    return list(records.values())


def between_marks(text: str, body: str) -> str:
    """The page with what stands between its two marks replaced."""
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    return f"{text[:begin]}\n\n{body}\n{text[end:]}"


def _sections(records: list[dict[str, Any]]) -> str:
    return "\n".join(map(_section, records))


def _summary(records: list[dict[str, Any]]) -> str:
    lines = [row(["network", "preset", "width", "float", *SUMMARY]), row(["---"] * (len(SUMMARY) + 4))]
    for record in records:
        for net, found in record["top1"].items():
            for width, by_column in found["top1"].items():
                cells = [cell(by_column[column]) for column in SUMMARY]
                lines.append(row([net, record["preset"], width, f"{found['float']:.2f}", *cells]))
    return "\n".join([*lines, ""])


def _deployment(records: list[dict[str, Any]]) -> str:
    """A section for each machine, since latencies of one do not compare with those of another."""
    machines: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        machine = f"{record['threads']} thread(s), {record['cpu']}; {environment(record)}."
        machines.setdefault(machine, []).append(record)
    return "\n".join(_deployed_on(machine, machines[machine]) for machine in sorted(machines))


def _deployed_on(machine: str, records: list[dict[str, Any]]) -> str:
    cells = [
        [net if model[0] == FLOAT else "", *model]
        for record in records
        for net, found in record["models"].items()
        for model in rows(found)
    ]
    lines = [f"### {records[0]['cpu']}", "", *table(["network", *HEADINGS], cells), "", machine]
    return "\n".join([*lines, "", "```", *[record["command"] for record in records], "```", ""])


def _reconstruction() -> str:
    return "\n".join(
        [*map(_methods, _records("reconstruction")), *map(steps, _records("step")), *map(_memory, _records("memory"))]
    )


def _memory(record: dict[str, Any]) -> str:
    headings = ["images", "pixels", "steps per unit", "memory budget, GB", "images, MB", "private, MB", "resident, MB"]
    keys = ("images", "size", "iterations", "budget_gb", "images_mb", "private_mb", "resident_mb")
    rows = [[f"{record[key]:.0f}" for key in keys]]
    return "\n".join([f"## Memory of {record['net']}", "", *table(headings, rows), *made_by(record)])


def steps(record: dict[str, Any]) -> str:
    """The table of what steps cost."""
    names = next(iter(record["milliseconds"].values()))
    rows = [[output, *[f"{median(times):.1f}" for times in found.values()]] for output, found in record["milliseconds"].items()]
    return "\n".join([f"## Milliseconds of a step of {record['of']}", "", *table(["", *names], rows), *made_by(record)])


def _methods(record: dict[str, Any]) -> str:
    lines = []
    for net, found in record["nets"].items():
        widths, seeds = ", ".join(found["widths"]), "seeds " + ", ".join(map(str, record["seeds"]))
        images = f"{record['images']} synthetic images" if "--synthetic" in record["command"] else f"{record['images']} images"
        runs = [(width, method, run) for width, runs in found["widths"].items() for method, run in runs.items() if run["top1"]]
        measures = {key: heading for key, heading in MEASURES.items() if any(run.get(key) for _, _, run in runs)}
        lines += [f"## {net}, {images}, {widths}, {seeds}", "", f"Float {found['float']:.2f}.", ""]
        cells = [
            [width, method, *[cell(run.get(key, []), DIGITS.get(key, 2)) for key in measures]] for width, method, run in runs
        ]
        lines += [*table(["width", "method", *measures.values()], cells), "", f"{found['splits'].capitalize()}."]
    return "\n".join([*lines, *conditions(record)])


def _section(record: dict[str, Any]) -> str:
    lines = []
    for net, found in record["top1"].items():
        columns = list(next(iter(found["top1"].values())))
        lines += [f"## {net}, preset {record['preset']}, float {found['float']:.2f}", ""]
        lines += [row(["width", *columns]), row(["---"] * (len(columns) + 1))]
        for width, by_column in found["top1"].items():
            lines.append(row([width, *[cell(by_column[column]) for column in columns]]))
        lines += ["", f"{found['splits'].capitalize()}."]
    return "\n".join([*lines, *conditions(record)])


if __name__ == "__main__":
    main()
