"""What a job found: the table for people, and the same as JSON beside the model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from inc_clusterq.deployment.inductor import Parity
from inc_clusterq.deployment.latency import Latency
from inc_clusterq.deployment.operators import Operator, summary
from inc_clusterq.synthesis.quality import SetQuality
from inc_clusterq.tuning import TuningOutcome

FORMAT = 1
DISTURBED = 3.0  # times the 10th percentile: with a 90th above that the median tells little


def place(folder: Path) -> str:
    """Digest of where a folder lies, which can be passed on where the path is nobody's business."""
    return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()


@dataclass(frozen=True)
class Row:
    """One model of the comparison."""

    name: str
    score: float
    size: int  # bytes of the saved model
    latency: Latency | None  # None where the model cannot be compiled, which ours can


@dataclass(frozen=True)
class Result:
    """The quantized model's folder, and everything that was measured on the way."""

    output: Path
    metric: str  # "accuracy" or "agreement"
    scored_on: str  # in words: which images
    rows: tuple[Row, ...]
    goal: float
    outcome: TuningOutcome
    parity: Parity
    config: Mapping[str, Any]
    environment: Mapping[str, str]
    seconds: Mapping[str, float]  # by stage
    operators: tuple[Operator, ...] = ()  # what the compiler made of each
    fingerprint: str = ""  # of the float model
    folder: str = "."  # of the YAML, relative to `output`
    place: str = ""  # the same as a digest: where a result has been moved, `folder` leads to another one
    synthetic: SetQuality | None = None  # how good the calibration set is

    @property
    def met_goal(self) -> bool:
        """Whether the best trial meets the accuracy criterion."""
        return self.outcome.best.met_goal

    def as_dict(self) -> dict[str, Any]:
        """Everything but the model, as JSON takes it."""
        return {
            "format": FORMAT,
            "metric": self.metric,
            "scored_on": self.scored_on,
            "goal": self.goal,
            "met_goal": self.met_goal,
            "models": [asdict(row) for row in self.rows],
            "best_trial": self.outcome.best.trial.label,
            "trials": [
                {"label": record.trial.label, "score": record.score, "met_goal": record.met_goal}
                for record in self.outcome.trials
            ],
            "reconstruction": asdict(self.outcome.reconstruction),
            "parity": asdict(self.parity),
            "operators": [{**asdict(found), "fell_back": found.fell_back} for found in self.operators],
            "seconds": dict(self.seconds),
            "environment": dict(self.environment),
            "config": dict(self.config),
            "fingerprint": self.fingerprint,
            "folder": self.folder,
            "place": self.place,
            "synthetic": self.synthetic.as_dict() if self.synthetic is not None else None,
        }

    def write(self, file: Path) -> None:
        """Write the JSON."""
        file.write_text(json.dumps(self.as_dict(), indent=2, default=str) + "\n", encoding="utf-8")

    def print(self, console: Console) -> None:
        """Print the table and what must be said with it."""
        table = Table(title=f"{self.metric} on {self.scored_on}; compiled, float and int8", title_justify="left")
        table.add_column("model")
        for heading in (self.metric, "on disk", "ms, batch 1", "10 to 90 %", "speed"):
            table.add_column(heading, justify="right")
        reference = self.rows[0].latency
        for row in self.rows:
            table.add_row(row.name, f"{row.score:.2%}", f"{row.size / 1024:.0f} KiB", *_latency_cells(row.latency, reference))
        console.print(table)
        if any(row.latency is not None and row.latency.high > DISTURBED * row.latency.low for row in self.rows):
            console.print(
                "The timings spread widely, as where something else is running; `inc-clusterq bench` times them again.",
                soft_wrap=True,
                highlight=False,
            )
        verdict = "meets" if self.met_goal else "MISSES"
        console.print(
            f"Best of {len(self.outcome.trials)} trial(s), {self.outcome.best.trial.label}: {verdict} the goal of "
            f"{self.goal:.2%}." + ("" if self.met_goal else " It is the best model found, and it was saved."),
            soft_wrap=True,
            highlight=False,
            markup=False,
        )
        if self.metric == "agreement":
            console.print(
                "No labelled set was named: agreement is the share of synthetic images to which a model gives the float "
                "model's class. It tells what quantization changed, not how accurate the float model is.",
                soft_wrap=True,
                highlight=False,
            )
        if self.synthetic is not None:
            console.print(self.synthetic.sentence(), soft_wrap=True, highlight=False)
        console.print(
            f"Compiled int8 against evaluated: {self.parity}.",
            soft_wrap=True,
            highlight=False,
        )
        console.print(f"Compiled: {summary(self.operators)}.", soft_wrap=True, highlight=False, markup=False)
        console.print(f"Saved in {self.output}", soft_wrap=True, highlight=False, markup=False)


def _latency_cells(latency: Latency | None, reference: Latency | None) -> tuple[str, str, str]:
    if latency is None:
        return ("-", "-", "-")
    speed = f"{reference.median / latency.median:.2f}x" if reference else "-"
    return f"{latency.median:.2f}", f"{latency.low:.2f} to {latency.high:.2f}", speed
