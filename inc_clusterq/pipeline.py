"""The whole job, in the order in which it happens."""

from __future__ import annotations

import inspect
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from inc_clusterq.config import Config, OpWise, QuantizationConfig
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
from inc_clusterq.origin import synthetic_images
from inc_clusterq.output import RESULT, check_output, filled_whole
from inc_clusterq.progress import SILENT, Progress, Stage
from inc_clusterq.reconstruction.bits import LayerBits
from inc_clusterq.reconstruction.settings import ReconstructionSettings
from inc_clusterq.registry import ADAPTORS, STRATEGIES, find
from inc_clusterq.result import Result, Row
from inc_clusterq.synthesis.quality import measure_set
from inc_clusterq.synthesis.statistics import batch_norms
from inc_clusterq.synthetic_set import workspace_dataset
from inc_clusterq.tuning import Adaptor, Score, Strategy, TuningRequest

logger = logging.getLogger(__name__)

LOSSES = "losses.png"
PARITY_IMAGES = 256  # at most: each is run one by one through the compiled model
FLOAT, STATIC, OURS = "float", "INC static, noise", "inc-clusterq"


def quantize(config: Config, *, overwrite: bool = False, strict: bool = False, progress: Progress = SILENT) -> Result:
    """Quantize the model that `config` names, save it, and report.

    Raises:
        UserError: anything that the user can correct; nothing is left half-written.
        DeploymentError: the compiled model does not compute what was evaluated; with `strict` also where it computes a
            quantizable operator in float.
    """
    seconds: dict[str, float] = {}
    check_output(config.output, overwrite=overwrite)
    check_compiler()
    strategy, adaptor = _strategy(config), find(ADAPTORS, config.tuning.host)()
    model = load_model(config.model)
    batch_norms(model.module)  # said at once, not after the export
    with _timed(seconds, "export"):
        exported = adaptor.export(model)
        request = _request(config)
        request = replace(request, units=adaptor.count_units(exported, request))
    trials = strategy.trials(request)
    labelled = load_labelled(config.evaluation.accuracy, model) if config.evaluation.accuracy else None
    with _timed(seconds, "synthesis"):
        dataset = workspace_dataset(config, model, progress)
        calibrating = config.quantization.calibration.sampling_size
        calibration, held_out = dataset.inputs[:calibrating], dataset.inputs[calibrating:]
        quality = measure_set(model.module, model.input, model.num_classes, dataset.inputs, dataset.labels)
    judge = _judge(model, labelled, held_out)
    batches = calibration.split(config.quantization.calibration.dataloader.batch_size)
    with _timed(seconds, "tuning"):
        workspace = config.tuning.workspace.path / "units"
        with synthetic_images():
            outcome = adaptor.tune(exported, batches, trials, request, judge.score, workspace, progress)
    with _timed(seconds, "static baseline"):
        static = adaptor.quantize_static(exported, _noise(batches, request.seed))
        scores = {FLOAT: outcome.float_score, STATIC: judge.score(static), OURS: outcome.best.score}
    with filled_whole(config.output) as folder:
        with _timed(seconds, "deployment"), progress.stage("Deploying", 5) as stage:
            adaptor.save(outcome.model, calibration[:2], folder)
            sizes = {FLOAT: _float_size(exported), STATIC: _saved_size(adaptor, static, calibration[:2]), OURS: _size(folder)}
            models = {FLOAT: model.module, STATIC: static, OURS: adaptor.load(folder)}
            parity, latencies, operators = _deployed(models, outcome.model, judge.inputs[:PARITY_IMAGES], stage)
        if strict:
            require_int8(operators, "inductor")
        result = Result(
            output=config.output,
            metric=judge.metric,
            scored_on=judge.images,
            rows=tuple(Row(name, scores[name], sizes[name], latencies.get(name)) for name in models),
            goal=outcome.float_score * (1 - request.tolerable_loss),
            outcome=outcome,
            parity=parity,
            config=config.model_dump(mode="json", by_alias=True),
            environment=environment(adaptor.versions()),
            seconds=seconds,
            operators=tuple(operators),
            folder=os.path.relpath(config.model.folder.resolve(), config.output.resolve()),
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
    known = list(inspect.signature(make).parameters)
    unknown = [key for key in chosen.options if key not in known]
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


def _within_range(quantization: QuantizationConfig) -> ReconstructionSettings:
    """The reconstruction's settings, with 7-bit weights where 8-bit ones would overflow (`quantization.reduce_range`)."""
    settings, wanted = quantization.reconstruction, quantization.reduce_range
    reduce = overflows(cpu()) if wanted == "auto" else wanted
    if not reduce:
        return settings
    return settings.model_copy(update={"weight_ceiling": min(settings.weight_ceiling, SAFE_WEIGHT_BITS)})


def _judge(model: FloatModel, labelled: tuple[Tensor, Tensor] | None, held_out: Tensor) -> _Judge:
    if labelled is not None:
        inputs, labels = labelled
        score = accuracy(inputs, labels)
        if score(model.module) == 0:
            raise DatasetError(
                f"the float model predicts none of the {len(labels)} labels; check the order of the classes and that the "
                "inputs are normalised as the model takes them"
            )
        return _Judge(score, "accuracy", f"{len(inputs)} labelled images", inputs)
    score = agreement(model.module, held_out)
    return _Judge(score, "agreement", f"{len(held_out)} held-out synthetic images", held_out)


def _noise(like: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Gaussian noise, the usual stand-in where no images are at hand."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch.shape, generator=generator) for batch in like]


def _float_size(exported: nn.Module) -> int:
    """Bytes of the float parameters and buffers; what a checkpoint of them needs at least."""
    return sum(tensor.numel() * tensor.element_size() for tensor in exported.state_dict().values())


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
