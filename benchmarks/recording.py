"""What the benchmark scripts print, and the file of their figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arguments import Options, command
from rich.console import Console
from rich.table import Table

from inc_clusterq.adaptors.neural_compressor import NeuralCompressorAdaptor
from inc_clusterq.environment import environment


def print_head(title: str, options: Options, console: Console) -> None:
    """Seeds, machine and versions: what the figures below depend on."""
    preset = f"preset {options.preset}, " if options.preset else ""
    console.print(f"{title}: {preset}seeds {', '.join(map(str, options.seeds))}", highlight=False)
    print_environment(console)


def print_environment(console: Console) -> None:
    """Machine and versions."""
    pairs = environment(NeuralCompressorAdaptor().versions()).items()
    console.print(", ".join(f"{name} {value}" for name, value in pairs), highlight=False, soft_wrap=True)


def print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], console: Console) -> None:
    """One table; the first column is left-aligned."""
    table = Table(title=title, title_justify="left")
    for position, heading in enumerate(headings):
        table.add_column(heading, justify="left" if position == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def write_json(options: Options, figures: dict[str, Any]) -> None:
    """All single figures with what they depend on."""
    if options.json is None:
        return
    given = {key: value for key, value in (("preset", options.preset), ("limit", options.limit)) if value}
    write(options.json, command(options), {**given, "seeds": options.seeds, **figures})


def write(file: Path, command: str, figures: dict[str, Any]) -> None:
    """Write figures, the call that repeats them, and machine and versions."""
    head = {"command": command, "environment": environment(NeuralCompressorAdaptor().versions())}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**head, **figures}, indent=2) + "\n", encoding="utf-8")
