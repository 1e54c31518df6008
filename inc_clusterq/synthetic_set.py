"""`inc-clusterq synthesize`: the calibration set of a job, as `quantize` would make it, and where it lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from inc_clusterq.config import Config
from inc_clusterq.models import FloatModel, load_model
from inc_clusterq.output import check_output, filled_whole
from inc_clusterq.progress import SILENT, Progress
from inc_clusterq.synthesis.dataset import MANIFEST, SyntheticDataset
from inc_clusterq.synthesis.statistics import batch_norms
from inc_clusterq.synthesis.store import Source, cached_dataset, cached_folder, describe, write_dataset


@dataclass(frozen=True)
class Synthesized:
    """A set that lies on disk."""

    folder: Path
    dataset: SyntheticDataset
    calibration: int  # the first so many samples calibrate; the rest score
    found: bool  # it was there already
    problem: str  # why the model gives no classes; empty where it does

    def print(self, console: Console) -> None:
        """Print what a person wants to know."""
        shape = list(self.dataset.shards[0][0].shape[1:])
        held_out = len(self.dataset) - self.calibration
        lines = [
            f"{len(self.dataset)} synthetic inputs of shape {shape}: {self.calibration} to calibrate with"
            + (f", {held_out} held out to score" if held_out else "")
            + f"; {len(self.dataset.shards)} shard(s)."
        ]
        if self.problem:
            lines.append(f"Matched to the BatchNorm statistics alone, labels are -1: {self.problem}, not class logits.")
        lines.append(f"{'Found' if self.found else 'Saved'} in {self.folder}")
        for line in lines:
            console.print(line, soft_wrap=True, highlight=False, markup=False)


def synthesize(
    config: Config, *, output: Path | None = None, overwrite: bool = False, progress: Progress = SILENT
) -> Synthesized:
    """Make or find the set in the workspace; with `output` copy it there.

    Raises:
        UserError: anything that the user can correct; nothing is left half-written.
    """
    if output is not None:
        check_output(output, overwrite=overwrite, report=MANIFEST, workspace=config.tuning.workspace.path)
    model = load_model(config.model, any_output=True)
    batch_norms(model.module)  # said at once
    folder = workspace_set(config, model)
    found = folder.exists()
    dataset = workspace_dataset(config, model, progress)
    if output is not None:
        with filled_whole(output, overwrite=overwrite, report=MANIFEST) as hidden:
            write_dataset(hidden, dataset, source(config).seen_from(output))
    calibration = config.quantization.calibration.sampling_size
    return Synthesized(output or folder, dataset, calibration, found and output is None, model.problem)


def samples(config: Config) -> int:
    """Calibration samples, and those that only score where no labelled set is named; one set for both."""
    held_out = 0 if config.evaluation.accuracy else config.evaluation.held_out
    return config.quantization.calibration.sampling_size + held_out


def workspace_dataset(config: Config, model: FloatModel, progress: Progress) -> SyntheticDataset:
    """The set of a job, made where it is not in the workspace yet."""
    return cached_dataset(
        _cache(config),
        model.module,
        fingerprint=model.fingerprint,
        spec=model.input,
        settings=config.quantization.calibration.dataloader.dataset.clusterq,
        num_classes=model.num_classes,
        samples=samples(config),
        seed=config.tuning.random_seed,
        progress=progress,
        source=source(config),
    )


def workspace_set(config: Config, model: FloatModel) -> Path:
    """The folder of that set, whether or not it is there."""
    request = describe(
        model.fingerprint,
        model.input,
        config.quantization.calibration.dataloader.dataset.clusterq,
        num_classes=model.num_classes,
        samples=samples(config),
        seed=config.tuning.random_seed,
    )
    return cached_folder(_cache(config), request)


def source(config: Config) -> Source:
    """Where the model comes from."""
    return Source(config.model.model_dump(mode="json", by_alias=True), config.model.folder)


def _cache(config: Config) -> Path:
    return config.tuning.workspace.path / "synthetic"
