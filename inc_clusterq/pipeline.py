"""The whole job, in the order in which it happens."""

from __future__ import annotations

import inspect
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from inc_clusterq.config import AccuracyConfig, Config, OpWise, QuantizationConfig
from inc_clusterq.cpu import SAFE_WEIGHT_BITS, cpu, overflows
from inc_clusterq.deployment.arithmetic import kernel_arithmetic
from inc_clusterq.deployment.inductor import Compiled, Parity, check_compiler, check_parity, compile_frozen
from inc_clusterq.deployment.inductor_operators import compile_and_list
from inc_clusterq.deployment.latency import Latency, milliseconds_in_turn
from inc_clusterq.deployment.operators import Operator, require_int8
from inc_clusterq.environment import environment
from inc_clusterq.errors import ConfigError, DatasetError, DeploymentError
from inc_clusterq.evaluation import accuracy, agreement
from inc_clusterq.labelled import load_labelled
from inc_clusterq.models import FloatModel, load_model
from inc_clusterq.output import RESULT, check_output, filled_whole
from inc_clusterq.progress import SILENT, Progress, Stage
from inc_clusterq.reconstruction.bits import LayerBits
from inc_clusterq.reconstruction.settings import ReconstructionSettings
from inc_clusterq.registry import ADAPTORS, STRATEGIES, find
from inc_clusterq.result import Result, Row, place
from inc_clusterq.synthesis.quality import measure_set
from inc_clusterq.synthesis.refine import random_samples
from inc_clusterq.synthesis.statistics import batch_norms
from inc_clusterq.synthetic_set import workspace_dataset
from inc_clusterq.tuning import Adaptor, Score, Strategy, TuningRequest

logger = logging.getLogger(__name__)

LOSSES = "losses.png"
PARITY_IMAGES = 256  # at most: each is run one by one through the compiled model
FLOAT, STATIC, OURS = "float", "INC static, noise", "inc-clusterq"
BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def quantize(config: Config, *, overwrite: bool = False, strict: bool = False, progress: Progress = SILENT) -> Result:
    """Quantize the model that `config` names, save it, and report.

    Raises:
        UserError: anything that the user can correct; nothing is left half-written.
        DeploymentError: the compiled model does not compute what was evaluated; with `strict` also where it computes a
            quantizable operator in float.
    """
    seconds: dict[str, float] = {}
    check_output(config.output, overwrite=overwrite, workspace=config.tuning.workspace.path)
    strategy, adaptor = _strategy(config), find(ADAPTORS, config.tuning.host)()
    model = load_model(config.model)
    batch_norms(model.module)  # said at once, not after the export
    check_compiler()
    judge = _by_labels(model, config.evaluation.accuracy) if config.evaluation.accuracy else None
    with _timed(seconds, "export"):
        exported = adaptor.export(model)
        request = _request(config)
        request = replace(request, units=adaptor.count_units(exported, request))
    trials = strategy.trials(request)
    with _timed(seconds, "synthesis"):
        dataset = workspace_dataset(config, model, progress)
        calibrating = config.quantization.calibration.sampling_size
        calibration, held_out = dataset.inputs[:calibrating], dataset.inputs[calibrating:]
        quality = measure_set(model.module, model.input, model.num_classes, dataset.inputs, dataset.labels)
    judge = judge or _by_agreement(model, held_out)
    batches = calibration.split(config.quantization.calibration.dataloader.batch_size)
    with _timed(seconds, "tuning"):
        workspace = config.tuning.workspace.path / "units"
        outcome = adaptor.tune(exported, batches, trials, request, judge.score, workspace, progress)
    with _timed(seconds, "static baseline"):
        noise = random_samples(model.input, calibrating, torch.Generator().manual_seed(request.seed))
        static = _baseline(adaptor, exported, noise, len(batches[0]), judge.score)
    with filled_whole(config.output, overwrite=overwrite) as folder:
        with _timed(seconds, "deployment"), progress.stage("Deploying", 5) as stage:
            adaptor.save(outcome.model, calibration[:2], folder)
            compared = [
                _Compared(FLOAT, model.module, outcome.float_score, _float_size(model.module)),
                *static,
                _Compared(OURS, adaptor.load(folder), outcome.best.score, _size(folder)),
            ]
            models = {one.name: one.module for one in compared}
            parity, latencies, operators = _deployed(models, outcome.model, judge.inputs[:PARITY_IMAGES], stage)
        if strict:
            require_int8(operators, "inductor")
        result = Result(
            output=config.output,
            metric=judge.metric,
            scored_on=judge.images,
            rows=tuple(Row(one.name, one.score, one.size, latencies.get(one.name)) for one in compared),
            goal=outcome.float_score * (1 - request.tolerable_loss),
            outcome=outcome,
            parity=parity,
            config=_as_decided(config),
            environment=environment(adaptor.versions()),
            seconds=seconds,
            operators=tuple(operators),
            fingerprint=model.fingerprint,
            folder=os.path.relpath(config.model.folder.resolve(), config.output.resolve()),
            place=place(config.model.folder),
            synthetic=quality,
        )
        from inc_clusterq.report.losses import loss_figure  # heavy: only once there is something to draw

        (folder / LOSSES).write_bytes(loss_figure(outcome.reconstruction))
        result.write(folder / RESULT)
    return result


def _deployed(
    models: Mapping[str, nn.Module], evaluated: nn.Module, inputs: Tensor, stage: Stage
) -> tuple[Parity, dict[str, Latency], list[Operator]]:
    """Compile all models as they would be deployed; check ours against what was evaluated; time them side by side.

    Others than ours are there for comparison, and may fail to compile.
    """
    example = inputs[:1].clone()
    compiled: dict[str, Compiled] = {}
    operators: list[Operator] = []
    for name, module in models.items():
        if name == OURS and isinstance(module, fx.GraphModule):
            compiled[name], operators = compile_and_list(module, example)
        else:
            try:
                compiled[name] = compile_frozen(module, example)
            except DeploymentError as failure:
                if name == OURS:
                    raise
                logger.warning("Of the model %r no latency is measured: %s", name, failure)
        stage.advance(1, f"compiled {name}")
    parity = check_parity(kernel_arithmetic(evaluated), compiled[OURS], inputs)
    stage.advance(1, "checked")
    latencies = {name: Latency.of(times) for name, times in milliseconds_in_turn(compiled, example).items()}
    stage.advance(1, "timed")
    return parity, latencies, operators


@dataclass(frozen=True)
class _Judge:
    """How models are scored, and on what."""

    score: Score
    metric: str
    images: str
    inputs: Tensor


def _strategy(config: Config) -> Strategy:
    chosen = config.tuning.strategy
    make = find(STRATEGIES, chosen.name)
    parameters = inspect.signature(make).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind in BY_NAME]
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    unknown = [] if takes_any else [key for key in chosen.options if key not in known]
    if unknown:
        raise ConfigError(
            f"tuning.strategy: {chosen.name} has no option {', '.join(unknown)}; it has {', '.join(known) or 'none'}"
        )
    try:
        strategy: Strategy = make(**chosen.options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"tuning.strategy: {chosen.name} does not take these options: {error}") from error
    return strategy


def _request(config: Config) -> TuningRequest:
    quantization = config.quantization
    return TuningRequest(
        weight_bits=quantization.model_wise.weight.bits,
        activation_bits=quantization.model_wise.activation.bits,
        settings=_within_range(quantization),
        layers={name: _layer_bits(widths) for name, widths in quantization.op_wise.items()},
        kinds={kind: _layer_bits(widths) for kind, widths in quantization.optype_wise.items()},
        max_trials=config.tuning.exit_policy.max_trials,
        tolerable_loss=config.tuning.accuracy_criterion.relative,
        seed=config.tuning.random_seed,
    )


def _layer_bits(widths: OpWise) -> LayerBits:
    return LayerBits(widths.weight.bits if widths.weight else None, widths.activation.bits if widths.activation else None)


def _reduces_range(quantization: QuantizationConfig) -> bool:
    return overflows(cpu()) if quantization.reduce_range == "auto" else quantization.reduce_range


def _as_decided(config: Config) -> dict[str, Any]:
    """The configuration as JSON takes it, with what it leaves to the machine."""
    plain = config.model_dump(mode="json", by_alias=True)
    plain["quantization"]["reduce_range"] = _reduces_range(config.quantization)
    return plain


def _within_range(quantization: QuantizationConfig) -> ReconstructionSettings:
    """The reconstruction's settings, with 7-bit weights where 8-bit ones would overflow (`quantization.reduce_range`)."""
    settings = quantization.reconstruction
    if not _reduces_range(quantization):
        return settings
    return settings.model_copy(update={"weight_ceiling": min(settings.weight_ceiling, SAFE_WEIGHT_BITS)})


def _by_labels(model: FloatModel, config: AccuracyConfig) -> _Judge:
    inputs, labels = load_labelled(config, model)
    score = accuracy(inputs, labels)
    if score(model.module) == 0:
        raise DatasetError(
            f"the float model predicts none of the {len(labels)} labels; check the order of the classes and that the "
            "inputs are normalised as the model takes them"
        )
    return _Judge(score, "accuracy", f"{len(inputs)} labelled images", inputs)


def _by_agreement(model: FloatModel, held_out: Tensor) -> _Judge:
    score = agreement(model.module, held_out)
    return _Judge(score, "agreement", f"{len(held_out)} held-out synthetic images", held_out)


@dataclass(frozen=True)
class _Compared:
    """A model of the table."""

    name: str
    module: nn.Module
    score: float
    size: int


def _baseline(adaptor: Adaptor, exported: nn.Module, noise: Tensor, batch: int, score: Score) -> list[_Compared]:
    """The host's own quantization, calibrated with noise, as is usual without images; none where that fails."""
    try:
        static = adaptor.quantize_static(exported, noise.split(batch))
        return [_Compared(STATIC, static, score(static), _saved_size(adaptor, static, noise[:2]))]
    except Exception as failure:  # it is there for comparison: a job does not end with it
        reason = " ".join(str(failure).split())[:200]
        logger.warning("%r fails and is not compared: %s: %s", STATIC, type(failure).__name__, reason)
        return []


def _float_size(module: nn.Module) -> int:
    """Bytes of the parameters and buffers, shared ones once; what a checkpoint of them needs at least."""
    tensors = [value for value in module.state_dict().values() if isinstance(value, Tensor)]  # modules add states of their own
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def _saved_size(adaptor: Adaptor, model: nn.Module, example: Tensor) -> int:
    with tempfile.TemporaryDirectory() as folder:
        adaptor.save(model, example, Path(folder))
        return _size(Path(folder))


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - began, 2)
