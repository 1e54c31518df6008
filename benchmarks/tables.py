"""Write the tables of docs/accuracy.md from the figures that `accuracy.py` has recorded.

python benchmarks/tables.py            rewrite docs/accuracy.md
python benchmarks/tables.py --check    exit with status 1 if it is not what the figures say
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = DOCS / "accuracy.md"
MARK = "<!-- everything below is written by benchmarks/tables.py -->"


def main() -> None:
    """Rewrite or check the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    text = page(PAGE.read_text(encoding="utf-8"), sorted((DOCS / "figures").glob("accuracy-*.json")))
    if parser.parse_args().check:
        sys.exit(int(text != PAGE.read_text(encoding="utf-8")))
    PAGE.write_text(text, encoding="utf-8")


def page(text: str, files: list[Path]) -> str:
    """The page with everything below the mark written anew."""
    head = text[: text.index(MARK)]
    return head + MARK + "\n\n" + "\n".join(_section(json.loads(file.read_text(encoding="utf-8"))) for file in files)


def _section(record: dict[str, Any]) -> str:
    lines = []
    for net, found in record["top1"].items():
        columns = list(next(iter(found["top1"].values())))
        lines += [f"## {net}, float {found['float']:.2f}", ""]
        lines += [_row(["width", *columns]), _row(["---"] * (len(columns) + 1))]
        for width, by_column in found["top1"].items():
            lines.append(_row([width, *[_cell(by_column[column]) for column in columns]]))
        lines += ["", f"{found['splits'].capitalize()}."]
    seeds = ", ".join(map(str, record["seeds"]))
    environment = ", ".join(f"{name} {value}" for name, value in record["environment"].items())
    lines += [
        f"{record['images']} calibration images; preset `{record['preset']}`; seeds {seeds}; {environment}.",
        "",
        f"`{record['command']}`",
        "",
    ]
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
