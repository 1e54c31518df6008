"""Records of several processes as one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def record(seeds: str, method: str, figures: list[float], **more: Any) -> dict[str, Any]:
    return {
        "command": f"python benchmarks/b.py --nets n --seeds {seeds} --methods '{method}' --json part.json",
        "environment": {"python": "3"},
        "preset": "fast",
        "seeds": [int(seed) for seed in seeds.split(",")],
        "images": 256,
        "nets": {"n": {"float": 91.5, "widths": {"W4A4": {method: {"top1": figures, "output_error": []}}}}},
        **more,
    }


def join(root: Path, folder: Path, *records: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    files = [folder / f"{number}.json" for number in range(len(records))]
    for file, content in zip(files, records, strict=True):
        file.write_text(json.dumps(content))
    script = root / "benchmarks" / "join.py"
    command = [sys.executable, str(script), *map(str, files), "--json", "whole.json"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_seeds_and_methods_of_several_records_are_one_record_in_order(root: Path, tmp_path: Path) -> None:
    parts = (
        record("2", "QDrop", [3.0]),
        record("0,1", "ours best", [10.0, 20.0]),
        record("0,1", "QDrop", [1.0, 2.0]),
        record("2", "ours best", [30.0]),
    )
    assert join(root, tmp_path, *parts).returncode == 0
    whole = json.loads((tmp_path / "whole.json").read_text())
    assert whole["seeds"] == [0, 1, 2]
    assert whole["nets"]["n"]["widths"]["W4A4"] == {
        "QDrop": {"top1": [1.0, 2.0, 3.0], "output_error": []},
        "ours best": {"top1": [10.0, 20.0, 30.0], "output_error": []},
    }
    assert whole["nets"]["n"]["float"] == 91.5
    assert whole["command"] == ("python benchmarks/b.py --nets n --seeds 0,1,2 --methods 'QDrop,ours best' --json whole.json")
    assert (whole["preset"], whole["images"], whole["environment"]) == ("fast", 256, {"python": "3"})


def test_a_seed_of_another_machine_is_told_apart_and_stays_so_when_joined_again(root: Path, tmp_path: Path) -> None:
    one, other = {"processor": "A", "instruction set": "AVX2"}, {"processor": "B", "instruction set": "AVX512"}
    first = record("0,1", "QDrop", [1.0, 2.0], environment={"python": "3", **one})
    assert join(root, tmp_path, first, record("2", "QDrop", [3.0], environment={"python": "3", **other})).returncode == 0
    whole = json.loads((tmp_path / "whole.json").read_text())
    assert whole["nets"]["n"]["widths"]["W4A4"]["QDrop"]["top1"] == [1.0, 2.0, 3.0]
    assert (whole["environment"], whole["machines"]) == ({"python": "3"}, [one, one, other])
    assert join(root, tmp_path, record("3", "QDrop", [4.0], environment={"python": "3", **one}), whole).returncode == 0
    assert json.loads((tmp_path / "whole.json").read_text())["machines"] == [one, one, other, one]


def test_one_seed_of_two_machines_is_refused(root: Path, tmp_path: Path) -> None:
    parts = [record("0", name, [1.0], environment={"python": "3", "processor": name}) for name in ("QDrop", "ours")]
    done = join(root, tmp_path, *parts)
    assert done.returncode == 1
    assert "seed 0 / machines is [{'processor': 'QDrop'}] in one record and [{'processor': 'ours'}]" in done.stderr


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (record("1", "QDrop", [2.0], environment={"python": "4"}), "environment / python is 3 in one record and 4 in another"),
        (
            record("1", "QDrop", [2.0]) | {"command": "python benchmarks/b.py --nets n --seeds 1 --methods QDrop --synthetic"},
            "call is python benchmarks/b.py in one record and python benchmarks/b.py --synthetic in another",
        ),
        ({"command": "python benchmarks/step.py"}, "python benchmarks/step.py is no call with seeds"),
        (record("0", "QDrop", [2.0]), "top1 is [1.0] in one record and [2.0] in another"),
        (record("1", "ours", [2.0]), "not every seed has nets / n / widths / W4A4 / QDrop / top1"),
        (record("1", "QDrop", [2.0], nets={"n": {"float": 90.0}}), "91.5 in one record is 90.0 in another"),
    ],
)
def test_what_does_not_belong_together_is_refused(root: Path, tmp_path: Path, other: dict[str, Any], message: str) -> None:
    done = join(root, tmp_path, record("0", "QDrop", [1.0]), other)
    assert done.returncode == 1
    assert message in done.stderr
    assert not (tmp_path / "whole.json").exists()
