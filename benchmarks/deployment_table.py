"""The table of deployed models, as `deployment.py` prints it and `tables.py` writes it into the docs."""

from __future__ import annotations

from typing import Any

FLOAT, STATIC, OURS, EAGER = "float", "INC static", "evaluated", "eager"
MODELS = (FLOAT, STATIC, OURS, EAGER, "inductor", "onnxruntime", "openvino")
HEADINGS = (
    "model",
    *("ms, 1", "speed", "ms, 32", "speed"),
    "int8",
    *("deviation", "largest", "same class", "same bits"),
    "top 1",
    "MB",
)
SHARES = ("rms", "largest", "agreement", "identical")


def rows(found: dict[str, Any]) -> list[list[str]]:
    """One row for each model of a network and width."""
    return [[model, *_cells(found[model], found["sizes"], model)] for model in MODELS]


def _cells(entry: dict[str, Any], sizes: dict[str, int], model: str) -> list[str]:
    cells = []
    for batch in ("batch 1", "batch 32"):
        timing = entry.get(batch)
        cells += [f"{timing['latency']['median']:.2f}", f"{timing['speed']['median']:.2f}x"] if timing else ["-", "-"]
    cells.append(f"{entry['operators'] - len(entry['in_float'])} of {entry['operators']}" if "operators" in entry else "-")
    cells += [f"{entry[key]:.2%}" for key in SHARES] if "rms" in entry else ["-"] * len(SHARES)
    cells.append("-" if entry.get("top1") is None else f"{entry['top1']:.2f}")
    size = {FLOAT: sizes["float32"], OURS: sizes["packed"]}.get(model, entry.get("size"))
    return [*cells, "-" if size is None else f"{size / 1e6:.2f}"]
