"""Intel Neural Compressor 3.x as a host: trials run through its own `autotune`, files are its own."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from neural_compressor.torch.export import export as host_export
from neural_compressor.torch.quantization import INT8StaticQuantConfig, TuningConfig, autotune, load
from neural_compressor.torch.quantization import quantize as host_quantize
from torch import Tensor, fx, nn

from inc_clusterq.adaptors.neural_compressor_algorithm import count_units, watched_by
from inc_clusterq.adaptors.neural_compressor_config import MRECGConfig
from inc_clusterq.adaptors.neural_compressor_save import save
from inc_clusterq.canonical import canonicalise
from inc_clusterq.deployment.qdq import without_training_patterns
from inc_clusterq.difference import largest_difference
from inc_clusterq.environment import installed
from inc_clusterq.errors import ClusterQError, ModelError
from inc_clusterq.models import FloatModel
from inc_clusterq.progress import SILENT, Progress
from inc_clusterq.quiet import quiet
from inc_clusterq.tuning import Score, Trial, TrialRecord, TuningOutcome, TuningRequest

__all__ = ["MRECGConfig", "NeuralCompressorAdaptor"]

EXPORT_TOLERANCE = 1e-3  # of the largest output
MOST_IMAGES_PER_CALL = 4096  # bound of the batch dimension that the exporter is told

HOST_LOG = "neural_compressor"  # where the host tells every step, at INFO


class NeuralCompressorAdaptor:
    """Runs trials through the host's `autotune`."""

    name = "neural_compressor"

    def export(self, model: FloatModel) -> nn.Module:
        """The host's export with a free batch dimension, in operators that its quantizer knows, checked against the original.

        Raises:
            ModelError: the model cannot be exported, or the exported graph computes something else.
        """
        example = torch.zeros(2, *model.input.shape)
        dynamic_shapes = ({0: torch.export.Dim("batch", min=1, max=MOST_IMAGES_PER_CALL)},)
        printed = io.StringIO()  # the exporter prints the whole graph where it fails
        with quiet(logging.CRITICAL, HOST_LOG), redirect_stdout(printed), redirect_stderr(printed), _differentiable_attention():
            try:
                exported = host_export(model.module, (example,), dynamic_shapes=dynamic_shapes)
            except RuntimeError as error:
                reason = _why_not_exported(model.module, example, dynamic_shapes)
                raise ModelError(f"{model.name} cannot be exported: {reason}{_last_place(printed.getvalue())}") from error
        assert isinstance(exported, fx.GraphModule)
        canonicalise(exported)
        shares = torch.rand(3, *model.input.shape, generator=torch.Generator().manual_seed(0))
        probe = torch.lerp(*model.input.bounds(shares), shares)
        with torch.no_grad():
            error_share = largest_difference(exported(probe), model.module(probe))
        if not error_share <= EXPORT_TOLERANCE:
            raise ModelError(
                f"{model.name}: the exported graph differs from the model by {error_share:.2g} of its largest output"
            )
        return exported

    def count_units(self, exported: nn.Module, request: TuningRequest) -> int:
        """Units that a trial can raise to 8 bits; see `Adaptor.count_units`."""
        with quiet(logging.WARNING, HOST_LOG):
            return count_units(_copied(exported), _config(Trial("", request.settings), request, None))

    def tune(
        self,
        exported: nn.Module,
        calibration: Sequence[Tensor],
        trials: Sequence[Trial],
        request: TuningRequest,
        score: Score,
        workspace: Path | None,
        progress: Progress = SILENT,
    ) -> TuningOutcome:
        """Run the trials through the host's `autotune`; see `Adaptor.tune`."""
        alike = [trial.label for number, trial in enumerate(trials) if _work(trial) in map(_work, trials[:number])]
        if alike or not trials:
            raise ClusterQError(
                f"the strategy proposed {'the same trial twice: ' + alike[0] if alike else 'no trial'}; "
                "Neural Compressor would skip it and lose count"
            )
        scores: list[float] = []

        def eval_fn(model: nn.Module) -> float:
            scores.append(score(model))
            return scores[-1]

        configs = [_config(trial, request, workspace) for trial in trials]
        tuning = TuningConfig(config_set=configs, tolerable_loss=request.tolerable_loss, max_trials=len(configs))
        with watched_by(progress), quiet(logging.WARNING, HOST_LOG):
            model = autotune(exported, tuning, eval_fn=eval_fn, run_fn=_runner(calibration))
        float_score, found = scores[0], scores[1:]
        goal = float_score * (1 - request.tolerable_loss)
        records = tuple(TrialRecord(trial, value, value >= goal) for trial, value in zip(trials, found, strict=False))
        best = max(records, key=lambda record: record.score)
        return TuningOutcome(model, model.reconstruction, float_score, best, records)

    def quantize_static(self, exported: nn.Module, calibration: Sequence[Tensor]) -> nn.Module:
        """The host's static quantization with its defaults; the given graph stays as it is."""
        with quiet(logging.ERROR, HOST_LOG), without_training_patterns():
            model: nn.Module = host_quantize(_copied(exported), INT8StaticQuantConfig(), run_fn=_runner(calibration))
        return model

    def save(self, model: nn.Module, example: Tensor, folder: Path) -> None:
        """Write `qconfig.json` and `quantized_weight.pt` as the host does."""
        with quiet(logging.WARNING, HOST_LOG):
            # A copy of its own: a view would drag the whole calibration set into the file.
            save(model, (example.clone(),), str(folder))

    def load(self, folder: Path) -> nn.Module:
        """The host's loader."""
        with quiet(logging.WARNING, HOST_LOG):
            model: nn.Module = load(str(folder))
        return model

    def versions(self) -> dict[str, str]:
        """The host comes as one of two distributions."""
        return installed("neural-compressor", "neural-compressor-pt", "torch", "torchao")


def _copied(exported: nn.Module) -> nn.Module:
    """An exported model of its own, with what the host has noted on it."""
    own = deepcopy(exported)
    own._exported, own.dynamic_shapes = True, exported.dynamic_shapes  # type: ignore[assignment]
    return own


def _work(trial: Trial) -> tuple[Any, int]:
    """What tells trials apart for the host, whatever they are called."""
    return trial.settings, trial.fallback_units


def _runner(calibration: Sequence[Tensor]) -> Any:
    """The host's `run_fn` for batches of images."""

    def run(model: nn.Module) -> None:
        with torch.no_grad():
            for batch in calibration:
                model(batch)

    return run


def _config(trial: Trial, request: TuningRequest, workspace: Path | None) -> MRECGConfig:
    settings = trial.settings.model_dump()
    return MRECGConfig(
        w_bits=request.weight_bits,
        act_bits=request.activation_bits,
        granularity=settings.pop("granularity") or "modcap",
        fallback_units=trial.fallback_units,
        layer_bits={name: (bits.weight, bits.activation) for name, bits in request.layers.items()},
        kind_bits={kind: (bits.weight, bits.activation) for kind, bits in request.kinds.items()},
        seed=request.seed,
        workspace=str(workspace) if workspace else None,
        settings=settings,
    )


@contextmanager
def _differentiable_attention() -> Iterator[None]:
    """Inside, layers such as `nn.TransformerEncoderLayer` are not one operator, of which units could learn nothing."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _why_not_exported(module: nn.Module, example: Tensor, dynamic_shapes: Any) -> str:
    """The exporter's own words; the host logs them and raises something general."""
    try:
        torch.export.export(module, (example,), dynamic_shapes=dynamic_shapes)
    except Exception as error:  # whatever the exporter raises is the answer here
        return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
    return "the host's export failed"


def _last_place(printed: str) -> str:
    """Where in the user's code the exporter stood last, as far as it has printed that."""
    places = re.findall(r"# File: (\S+) in \S+, code: (.+)", printed)
    return f" (at {places[-1][0]}: {places[-1][1].strip()})" if places else ""
