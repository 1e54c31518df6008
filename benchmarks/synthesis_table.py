"""The tables of sources of calibration images, as `tables.py` writes them into docs/sources.md from recorded figures."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from page import cell, conditions, made_by, table

IMAGES = 256  # of the tables that compare sources; records of other numbers show what more or fewer images are worth
MEASURES = ("statistics_distance", "diversity")  # of the set, beside what it led to
SET = ("distance", "diversity")  # their headings
NOTHING = "No figures have been recorded yet."


def sections(
    records: list[dict[str, Any]], presets: Sequence[dict[str, Any]] = (), teachers: Sequence[dict[str, Any]] = ()
) -> str:
    """All tables: sources, what each part is worth, numbers of images, what presets cost, and a step in the network."""
    usual = [record for record in records if record["images"] == IMAGES]
    lines = ["### Sources", ""]
    lines += _compared([record for record in usual if not is_ablation(record)]) or [NOTHING, ""]
    if ablations := [record for record in usual if is_ablation(record)]:
        lines += ["### Without one part", "", *_compared(ablations)]
    if len({record["images"] for record in records}) > 1:
        lines += ["### Numbers of images", "", *_numbers(records)]
    for record in presets:
        lines += ["### Cost of the presets", "", *_presets(record)]
    for record in teachers:
        lines += ["### Milliseconds of a step in the network", "", *_steps(record)]
    return "\n".join(lines)


def _presets(record: dict[str, Any]) -> list[str]:
    rows = [
        [net, preset, cell(costs["seconds"], 0), cell(costs["peak_mb"], 0)]
        for net, found in record["presets"].items()
        for preset, costs in found.items()
    ]
    return [*table(["network", "preset", "seconds", "peak MB"], rows), "", f"{record['images']} images.", *made_by(record)]


def _steps(record: dict[str, Any]) -> list[str]:
    ways = list(next(iter(record["nets"].values()))["milliseconds"])
    rows = [
        [net, *[f"{median(found['milliseconds'][way]):.0f}" for way in ways], f"{found['seconds_to_compile']:.0f}"]
        for net, found in record["nets"].items()
    ]
    images = f"{record['images']} images of {record['size']} pixels; weights are random."
    return [*table(["network", *ways, "seconds to compile"], rows), "", images, *made_by(record)]


def is_ablation(record: dict[str, Any]) -> bool:
    """Whether a record holds a source with one of its parts taken away, such as `clusterq-alignment`."""
    return any("-" in source for found in record["synthesis"].values() for source in found["sources"])


def _compared(records: list[dict[str, Any]]) -> list[str]:
    lines = []
    for record in records:
        for net, found in record["synthesis"].items():
            columns = list(next(iter(found["sources"].values()))["top1"])
            errors = _columns_of_errors(found)
            headings = ["source", *columns, *[f"{column} error" for column in errors], "seconds", "peak MB", *SET]
            rows = [[source, *_cells(entry, columns, errors)] for source, entry in found["sources"].items()]
            lines += [f"#### {net}, float {found['float']:.2f}", "", *table(headings, rows)]
            lines += ["", f"{found['splits'].capitalize()}."]
        lines += conditions(record)
    return lines


def _columns_of_errors(found: dict[str, Any]) -> list[str]:
    """Of which errors of the outputs are recorded: none in older records, or where there are no images for it."""
    errors = next(iter(found["sources"].values())).get("output_error", {})
    return [column for column, values in errors.items() if values]


def _cells(entry: dict[str, Any], columns: list[str], errors: list[str]) -> list[str]:
    measured = [[quality[measure] for quality in entry["quality"]] for measure in MEASURES]
    costs = [cell(entry["seconds"], 0), cell(entry["peak_mb"], 0)]
    accuracies = [cell(entry["top1"][column]) for column in columns]
    distances = [cell(entry["output_error"][column], 3) for column in errors]
    return [*accuracies, *distances, *costs, cell(measured[0], 3), cell(measured[1], 1)]


def _numbers(records: list[dict[str, Any]]) -> list[str]:
    """Networks and sources of which several numbers of images are recorded, fewest first."""
    found: dict[tuple[str, str], dict[int, dict[str, list[float]]]] = {}
    for record in records:
        for net, measured in record["synthesis"].items():
            for source, entry in measured["sources"].items():
                found.setdefault((net, source), {})[record["images"]] = entry["top1"]
    several = {key: by_number for key, by_number in found.items() if len(by_number) > 1}
    measured = [top1 for numbers in several.values() for top1 in numbers.values()]
    columns = [column for column in next(iter(measured), {}) if all(column in top1 for top1 in measured)]
    rows = [
        [net, source, str(images), *[cell(numbers[images][column]) for column in columns]]
        for (net, source), numbers in several.items()
        for images in sorted(numbers)
    ]
    unusual = sorted((record for record in records if record["images"] != IMAGES), key=lambda record: int(record["images"]))
    others = [line for record in unusual for line in conditions(record)]
    return [*table(["network", "source", "images", *columns], rows), "", *others]
