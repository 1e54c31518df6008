from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from torch import nn

from inc_clusterq.deployment.inductor import Parity
from inc_clusterq.deployment.latency import Latency
from inc_clusterq.reconstruction.reconstruct import Reconstruction
from inc_clusterq.reconstruction.settings import ReconstructionSettings
from inc_clusterq.result import Result, Row
from inc_clusterq.tuning import Trial, TrialRecord, TuningOutcome


def record(label: str, score: float, met_goal: bool) -> TrialRecord:
    return TrialRecord(Trial(label, ReconstructionSettings()), score, met_goal)


@pytest.fixture
def result(tmp_path: Path) -> Result:
    """Missed its goal; the second of two trials is the best."""
    trials = (record("modcap", 0.9, False), record("loss", 0.95, False))
    return Result(
        output=tmp_path / "out",
        metric="agreement",
        scored_on="256 held-out synthetic images",
        rows=(
            Row("float", 1.0, 4096, Latency(2.0, 1.9, 2.2)),
            Row("static", 0.8, 8192, Latency(1.0, 0.9, 1.1)),
            Row("ours", 0.95, 1024, Latency(0.5, 0.4, 0.6)),
        ),
        goal=0.99,
        outcome=TuningOutcome(nn.Identity(), Reconstruction("loss", ()), 1.0, trials[1], trials),
        parity=Parity(256, 1e-9, 2e-5, 1.0, 1e-8, 1.0),
        config={"model": {"name": "net"}, "output": tmp_path / "out"},
        environment={"torch": "2"},
        seconds={"tuning": 1.5},
    )


def printed(result: Result) -> str:
    file = StringIO()
    result.print(Console(file=file, width=200))
    return file.getvalue()


def test_the_json_holds_what_was_measured(result: Result, tmp_path: Path) -> None:
    result.write(tmp_path / "result.json")
    found = json.loads((tmp_path / "result.json").read_text())
    assert [(row["name"], row["score"], row["size"], row["latency"]["median"]) for row in found["models"]] == [
        ("float", 1.0, 4096, 2.0),
        ("static", 0.8, 8192, 1.0),
        ("ours", 0.95, 1024, 0.5),
    ]
    assert found["best_trial"] == "loss"
    assert [trial["score"] for trial in found["trials"]] == [0.9, 0.95]
    assert found["met_goal"] is False
    assert found["goal"] == 0.99
    assert found["reconstruction"]["granularity"] == "loss"
    assert found["parity"]["images"] == 256
    assert found["config"]["output"] == str(result.output)
    assert isinstance(found["format"], int)


def test_timings_that_something_disturbed_are_said_to_be(result: Result) -> None:
    assert "times them again" not in printed(result)
    disturbed = replace(result.rows[1], latency=Latency(1.0, 0.5, 1.6))
    assert "times them again" in printed(replace(result, rows=(result.rows[0], disturbed)))


def test_the_table_compares_with_float(result: Result) -> None:
    lines = printed(result).splitlines()
    (ours,) = [line for line in lines if line.split()[1:2] == ["ours"]]
    assert "95.00%" in ours
    assert "1 KiB" in ours
    assert "0.50" in ours
    assert "4.00x" in ours
    assert str(result.output) in lines[-1]


def test_a_missed_goal_is_said_clearly(result: Result) -> None:
    text = printed(result)
    assert "Best of 2 trial(s), loss: MISSES the goal of 99.00%. It is the best model found, and it was saved." in text
    assert not result.met_goal


def test_a_goal_that_was_met_is_said_too(result: Result) -> None:
    met = record("modcap", 0.995, True)
    text = printed(replace(result, outcome=replace(result.outcome, best=met, trials=(met,))))
    assert "Best of 1 trial(s), modcap: meets the goal of 99.00%." in text
    assert "MISSES" not in text


def test_the_limits_of_agreement_are_said_where_no_labels_were_used(result: Result) -> None:
    assert "not how accurate the float model is" in printed(result)
    assert "not how accurate the float model is" not in printed(replace(result, metric="accuracy"))
