"""`inc-clusterq inspect`: how good a synthetic set is, as a page, as JSON and as a short table.

Real inputs may be set beside it for comparison. They come after the fact: the set is made, and nothing of it changes.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from torch import Tensor

from inc_clusterq.config import AccuracyConfig, Config, ModelConfig
from inc_clusterq.environment import environment
from inc_clusterq.errors import ConfigError, DatasetError
from inc_clusterq.home import expanded
from inc_clusterq.labelled import load_labelled, load_npz
from inc_clusterq.models import FloatModel, load_model
from inc_clusterq.output import check_output, filled_whole
from inc_clusterq.progress import SILENT, Progress
from inc_clusterq.references import REFERENCE_PATTERN
from inc_clusterq.report.figures import by_layer, clouds, first_of_each_class, gallery
from inc_clusterq.report.page import embedded, render
from inc_clusterq.synthesis.dataset import MANIFEST, SyntheticDataset, canonical, load_dataset
from inc_clusterq.synthesis.quality import Looked, SetQuality, look, measure, noise_distance, project
from inc_clusterq.synthesis.teacher import teach

logger = logging.getLogger(__name__)

FORMAT = 1
REPORT, PAGE = "inspection.json", "inspection.html"
SHOWN = 40  # inputs in a gallery
SEED = 0  # of the choice of real inputs


@dataclass(frozen=True)
class Inspection:
    """What was found, and where it was written."""

    output: Path
    synthetic: SetQuality
    real: SetQuality | None
    real_name: str

    def as_dict(self) -> dict[str, Any]:
        """Everything but the pictures, as JSON takes it."""
        return {
            "format": FORMAT,
            "synthetic": self.synthetic.as_dict(),
            "real": self.real.as_dict() if self.real else None,
            "real_name": self.real_name,
            "environment": environment({"torch": str(torch.__version__)}),
        }

    def summary(self) -> list[dict[str, str]]:
        """The measures of the whole set in words."""
        mean = f"mean of {len(self.synthetic.layers)} layers"
        last = "last layer"
        rows: list[tuple[str, Callable[[SetQuality], str]]] = [
            (f"distance from the BatchNorm statistics, {mean}", lambda q: _number(q.mean("statistics_distance"))),
            (f"the same of noise, {mean}", lambda q: _number(q.noise_distance)),
            (f"coverage of the ranges they imply, {mean}", lambda q: _share(q.mean("implied_coverage"))),
            (f"beyond those ranges, {mean}", lambda q: _share(q.mean("implied_excess"))),
            (f"class separability, {last}", lambda q: _number(q.layers[-1].separability)),
            (f"variation between samples, {mean}", lambda q: _share(q.mean("variation"))),
            (f"diversity, directions, {last}", lambda q: _number(q.layers[-1].diversity)),
            ("nearest neighbour, share of the value range", lambda q: _share(q.nearest)),
            ("recognised by the model as their class", lambda q: _share(q.recognised)),
        ]
        if self.real is not None:
            rows[4:4] = [
                (f"coverage of real ranges, {mean}", lambda q: _share(q.mean("real_coverage"))),
                (f"beyond real ranges, {mean}", lambda q: _share(q.mean("real_excess"))),
            ]
        real = self.real
        return [{"name": name, "synthetic": of(self.synthetic), "real": of(real) if real else ""} for name, of in rows]

    def print(self, console: Console) -> None:
        """Print the summary and where the page is."""
        table = Table(title=f"{self.synthetic.samples} synthetic inputs", title_justify="left")
        table.add_column("measure")
        table.add_column("synthetic", justify="right")
        if self.real is not None:
            table.add_column(f"{self.real.samples} real", justify="right")
        for row in self.summary():
            table.add_row(row["name"], row["synthetic"], *([row["real"]] if self.real is not None else []))
        console.print(table)
        console.print(f"Saved in {self.output / PAGE}", soft_wrap=True, highlight=False, markup=False)


def inspect(
    dataset: Path,
    *,
    config: Config | None = None,
    real: str | None = None,
    output: Path | None = None,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Inspection:
    """Measure the set in the folder `dataset`; write page and JSON, by default into a folder of their own inside it.

    The model comes from `config`, or is the one that the set's manifest names. `real` is an .npz file with `inputs` and
    `labels` or `python:module:function`; without it the labelled set that `config` names is taken, where it names one.

    Raises:
        UserError: anything that the user can correct; nothing is left half-written.
    """
    if real is not None and real.startswith("python:") and not re.match(REFERENCE_PATTERN, real):
        raise ConfigError(f"--real is {real}; it must read python:package.module:function, or name an .npz file")
    opened = load_dataset(dataset)
    output = output or dataset / "inspection"
    check_output(output, overwrite=overwrite, report=REPORT)
    model_config = config.model if config is not None else _named_model(dataset, opened)
    model = load_model(model_config, any_output=True)
    request = opened.manifest.get("request", {})
    if model.fingerprint != request.get("fingerprint"):
        raise DatasetError(f"{dataset} was made for another model than {model_config.architecture}; name its YAML by --config")
    if json.loads(canonical(asdict(model.input))) != request.get("spec"):
        raise DatasetError(
            f"{dataset} was made for another shape, range or normalisation than model.input says; name its YAML by --config"
        )
    if real is None and config is not None and config.evaluation.accuracy is not None:
        real = config.evaluation.accuracy.dataset
    labelled = _real(real, model, model_config, len(opened)) if real is not None else None
    if labelled is not None and len(labelled[0]) < len(opened):
        logger.warning(
            "There are %d real inputs and %d synthetic ones: ranges, neighbours and diversity grow with their number, so give "
            "as many real ones",
            len(labelled[0]),
            len(opened),
        )
    with (
        progress.stage("Inspecting the set", 3) as stage,
        teach(model.module, model.input, num_classes=model.num_classes, first_aligned_layer=None) as teacher,
    ):
        theirs = look(teacher, *labelled) if labelled else None
        stage.advance(1, "real inputs")
        ranges = [seen.range for seen in theirs.layers] if theirs else None
        ours = look(teacher, opened.inputs, opened.labels)
        stage.advance(1, "synthetic inputs")
        noise = noise_distance(teacher, model.input)
        found = Inspection(
            output,
            measure(ours, teacher, model.input, noise, ranges),
            measure(theirs, teacher, model.input, noise, ranges) if theirs else None,
            real or "",
        )
        with filled_whole(output, overwrite=overwrite, report=REPORT) as folder:
            (folder / REPORT).write_text(json.dumps(found.as_dict(), indent=2) + "\n", encoding="utf-8")
            (folder / PAGE).write_text(_page(found, model, opened, ours, theirs), encoding="utf-8")
        stage.advance(1, "page")
    return found


def _named_model(folder: Path, dataset: SyntheticDataset) -> ModelConfig:
    source = dataset.manifest.get("source")
    if not isinstance(source, dict) or not {"folder", "model"} <= source.keys():
        raise DatasetError(f"{folder / MANIFEST} does not say where the model is; name the job's YAML by --config")
    code = (folder / source["folder"]).resolve()
    if code.is_relative_to(folder.resolve()):
        raise DatasetError(
            f"{folder / MANIFEST} names {code} as the folder of the model's code, which lies in the set itself; a set is data, "
            "and none of its own code is run: name the job's YAML by --config"
        )
    try:
        return ModelConfig.model_validate(source["model"], context={"folder": code})
    except ValidationError as error:
        raise DatasetError(f"{folder / MANIFEST} describes no model; name the job's YAML by --config") from error


def _real(reference: str, model: FloatModel, config: ModelConfig, most: int) -> tuple[Tensor, Tensor]:
    """Real inputs and labels, at most as many as there are synthetic ones, drawn at random."""
    if reference.startswith("python:"):
        named = AccuracyConfig.model_validate({"dataset": reference}, context={"folder": config.folder})
        inputs, labels = load_labelled(named, model)
    else:
        inputs, labels = load_npz(_file(reference), model)
    chosen = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(SEED))[:most]
    return inputs[chosen], labels[chosen]


def _file(reference: str) -> Path:
    try:
        return expanded(Path(reference))
    except ValueError as error:
        raise ConfigError(f"--real: {error}") from error


def _page(found: Inspection, model: FloatModel, dataset: SyntheticDataset, ours: Looked, theirs: Looked | None) -> str:
    sets = [ours] if theirs is None else [ours, theirs]
    features = project(torch.cat([looked.layers[-1].samples.mean for looked in sets])).split([len(s.inputs) for s in sets])
    names = [layer.name for layer in found.synthetic.layers]
    cloud = {name: (points, s.labels) for name, points, s in zip(("synthetic", "real"), features, sets, strict=False)}
    covers = {"of implied ranges": [layer.implied_coverage for layer in found.synthetic.layers]}
    distances = {"synthetic": [layer.statistics_distance for layer in found.synthetic.layers]}
    if found.real is not None:
        covers["of real ranges"] = [layer.real_coverage or 0 for layer in found.synthetic.layers]
        distances["real"] = [layer.statistics_distance for layer in found.real.layers]
    return render(
        PAGE,
        title=f"Synthetic set for {model.name}",
        shape=list(model.input.shape),
        problem=model.problem,
        request=dataset.manifest["request"],
        decided=dataset.manifest["decided"],
        synthetic=found.synthetic,
        real=found.real,
        real_name=found.real_name,
        summary=found.summary(),
        gallery=embedded(_gallery(ours, model)),
        real_gallery=embedded(_gallery(theirs, model)) if theirs is not None else "",
        projection=embedded(clouds(cloud)),
        coverage=embedded(by_layer(names, covers, "coverage by the synthetic set")),
        distance=embedded(by_layer(names, distances, "distance from the BatchNorm statistics", log=True)),
    )


def _gallery(looked: Looked, model: FloatModel) -> bytes:
    shown = first_of_each_class(looked.labels, SHOWN)
    return gallery(looked.inputs[shown], looked.labels[shown], model.input)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
