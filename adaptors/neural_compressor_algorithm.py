"""The algorithm "mrecg" of Neural Compressor 3.x: prepare, calibrate, reconstruct, convert (arXiv 2303.11906).

Importing this module registers it with the host. It works on the graph that the host's own static quantization prepares,
so quantizers sit where the deployed graph has them, and its result is in the host's own PT2E form: saved under the host's
key "static_quant", it loads on a machine that has the host alone.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from neural_compressor.common.utils import Mode
from neural_compressor.torch.algorithms.pt2e_quant.core import W8A8PT2EQuantizer
from neural_compressor.torch.quantization import INT8StaticQuantConfig
from neural_compressor.torch.utils import register_algo
from neural_compressor.torch.utils.utility import algos_mapping
from torch import Tensor, fx, nn

from inc_clusterq.adaptors.neural_compressor_config import ALGORITHM, MRECGConfig, refuse_foreign
from inc_clusterq.adaptors.neural_compressor_save import save
from inc_clusterq.canonical import canonicalise
from inc_clusterq.cpu import cpu, range_warning
from inc_clusterq.deployment.preparation import prepare_for_kernels
from inc_clusterq.deployment.qdq import convert
from inc_clusterq.difference import largest_difference
from inc_clusterq.errors import ModelError
from inc_clusterq.layout import laid_out
from inc_clusterq.nodes import is_observer
from inc_clusterq.placement import CPU, moved, within_gpu_memory
from inc_clusterq.precision import float32_by_default
from inc_clusterq.progress import SILENT, Progress
from inc_clusterq.reconstruction.bits import BitPlan
from inc_clusterq.reconstruction.checkpoint import UnitStore
from inc_clusterq.reconstruction.fake_quantize import WeightQuantizer
from inc_clusterq.reconstruction.granularity import explicit_units
from inc_clusterq.reconstruction.graph import replace_observers
from inc_clusterq.reconstruction.quantizers import QuantizedGraph, install_quantizers
from inc_clusterq.reconstruction.reconstruct import Reconstruction, base_units, reconstruct
from inc_clusterq.reconstruction.sensitivity import can_be_raised, most_harmful
from inc_clusterq.reconstruction.settings import ReconstructionSettings

logger = logging.getLogger(__name__)

SAVED_AS = "static_quant"  # the host's loader chooses by this key
CALIBRATION = "inc_clusterq.calibration"  # key of what a prepared graph remembers, in `meta`: attributes are lost in copies
FLOAT_TOLERANCE = 1e-3  # of the largest output; folding BatchNorm costs about 1e-6

_progress: ContextVar[Progress] = ContextVar("progress", default=SILENT)


@contextmanager
def watched_by(progress: Progress) -> Iterator[None]:
    """Reconstructions that the host runs inside the block report to `progress`; the host has no way to pass it on."""
    token = _progress.set(progress)
    try:
        yield
    finally:
        _progress.reset(token)


@float32_by_default()
def mrecg_entry(
    model: nn.Module,
    configs_mapping: dict[Any, Any],
    mode: Mode = Mode.QUANTIZE,
    *args: Any,
    run_fn: Any = None,
    run_args: Any = None,
    **kwargs: Any,
) -> nn.Module:
    """The algorithm as the host calls it: prepare, calibrate with `run_fn`, convert.

    Raises:
        ModelError: the model was not exported, or no calibration image passed through it.
    """
    config = next(config for config in configs_mapping.values() if config.name == ALGORITHM)
    if mode in (Mode.PREPARE, Mode.QUANTIZE):
        model = _prepare(model)
    if mode is Mode.QUANTIZE and run_fn is not None:
        run_fn(model, *run_args) if run_args else run_fn(model)
    if mode in (Mode.CONVERT, Mode.QUANTIZE):
        model = _convert(model, config)
    return model


refuse_foreign(algos_mapping.get(ALGORITHM))
register_algo(ALGORITHM)(mrecg_entry)


@dataclass
class _Calibration:
    """What a prepared model remembers until it is converted."""

    example: Tensor
    reference: Tensor  # the float model's outputs for `example`
    batches: list[Tensor]
    hook: Any
    dynamic_shapes: Any  # as the model was exported; the host's `save` wants them


def _prepare(model: nn.Module) -> fx.GraphModule:
    """The host's own prepared graph, which from now on keeps the images that pass through it."""
    if not getattr(model, "_exported", False):
        raise ModelError(
            "the model has not been exported; call neural_compressor.torch.export.export(model, example_inputs) first"
        )
    assert isinstance(model, fx.GraphModule)
    if any(is_observer(node) for node in model.graph.nodes):
        raise ModelError("the exported model has been prepared before; the host does that in place, so export it again")
    example = _random_input(model)
    with torch.no_grad():
        reference = model(example)
    _check_output(reference, len(example))
    canonicalise(model)  # which a job has done; a user's own call of the host's export has not
    dynamic_shapes = getattr(model, "dynamic_shapes", None)
    W8A8PT2EQuantizer.is_dynamic = False  # a class attribute that the host's dynamic algorithm leaves set
    try:
        by_host = W8A8PT2EQuantizer(quant_config=INT8StaticQuantConfig()).prepare(model)
    except Exception as error:  # the host knows no error of its own for what it does not expect in a graph
        raise ModelError(
            f"Neural Compressor cannot prepare this model for quantization: {type(error).__name__}"
            f"{f': {error}' if str(error) else ''}; its traceback, which --debug shows, tells at which operator"
        ) from error
    prepared: fx.GraphModule = deepcopy(by_host)  # the exported graph shares its parameters with the user's float model
    replace_observers(prepared, lambda name: nn.Identity())  # they cost time, and fail where kernels depend on the batch
    batches: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        (images,) = (*inputs, *named.values())
        if images.shape[1:] != example.shape[1:]:
            found, wanted = tuple(images.shape[1:]), tuple(example.shape[1:])
            raise ModelError(f"calibration images have shape {found} each; the model was exported for {wanted}")
        batches.append(laid_out(images.detach()).clone())  # a loader may fill the same tensor again

    hook = prepared.register_forward_pre_hook(keep, with_kwargs=True)
    prepared.meta[CALIBRATION] = _Calibration(example, reference, batches, hook, dynamic_shapes)
    return prepared


def _check_output(output: Any, samples: int) -> None:
    if not isinstance(output, Tensor):
        raise ModelError(f"the model returns {type(output).__name__}; only models that return one tensor can be quantized")
    if not output.is_floating_point() or output.dim() < 2 or len(output) != samples:
        raise ModelError(
            f"the model returns {output.dtype} of shape {tuple(output.shape)} for {samples} samples; only models that return "
            f"floats of shape ({samples}, channels, ...) for these can be quantized: leave what comes behind to your own code"
        )


def _random_input(exported: fx.GraphModule) -> Tensor:
    """Two samples of the shape that the model was exported with; whatever numbers, always the same ones.

    The second has none below zero, where a logarithm or a root would tell nothing.
    """
    inputs = [node for node in exported.graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        raise ModelError(f"the model has {len(inputs)} inputs; only models with one image tensor as input can be quantized")
    shape = inputs[0].meta["val"].shape
    if isinstance(shape[0], int):  # images pass in batches of our size, and of the user's once it is saved
        raise ModelError(
            f"the model was exported for batches of {shape[0]} alone; give the host's export dynamic_shapes="
            "loader.dynamic_shapes, or ({0: torch.export.Dim('batch')},)"
        )
    numbers = torch.randn(2, *(int(size) for size in shape[1:]), generator=torch.Generator().manual_seed(0))
    return torch.cat([numbers[:1], numbers[1:].abs()])


def _convert(prepared: nn.Module, config: MRECGConfig) -> fx.GraphModule:
    """Reconstruct on the images that were seen, and hand over to the host's quantized form."""
    calibration: _Calibration | None = getattr(prepared, "meta", {}).pop(CALIBRATION, None)
    if calibration is None:
        raise ModelError(
            "the model has not been prepared; call neural_compressor.torch.quantization.prepare(model, config) first"
        )
    assert isinstance(prepared, fx.GraphModule)
    calibration.hook.remove()
    if not calibration.batches:
        raise ModelError(
            "no calibration image has passed through the prepared model; give run_fn, for example loader.calibrate"
        )
    inputs = torch.cat(calibration.batches)
    calibration.batches.clear()  # as large as `inputs`
    if not bool(inputs.isfinite().all()):
        number = int((~inputs.isfinite().flatten(1).all(1)).nonzero()[0])
        raise ModelError(f"calibration image {number}, counted from 0, holds values that are not finite")
    _assert_finite(prepared, inputs[:2])
    plan, settings = config.bit_plan(), config.reconstruction_settings()
    for parameter in prepared.parameters():
        parameter.requires_grad_(False)
    if config.fallback_units:
        plan = _with_fallback(deepcopy(prepared), inputs, plan, settings, config.fallback_units, calibration)
    converted, reconstruction = _reconstruct(prepared, inputs, plan, settings, config, calibration)
    converted.dynamic_shapes = calibration.dynamic_shapes
    converted.qconfig = OrderedDict({SAVED_AS: config})  # type: ignore[assignment]
    converted.save = MethodType(save, converted)  # type: ignore[assignment]
    converted.reconstruction = reconstruction  # type: ignore[assignment]
    return converted


@within_gpu_memory()
def _reconstruct(
    prepared: fx.GraphModule,
    inputs: Tensor,
    plan: BitPlan,
    settings: ReconstructionSettings,
    config: MRECGConfig,
    calibration: _Calibration,
) -> tuple[fx.GraphModule, Reconstruction]:
    quantized = _installed(prepared, plan, settings)
    _warn(range_warning(cpu(), [part.bits for part in prepared.modules() if isinstance(part, WeightQuantizer)]))
    _assert_unchanged(prepared, calibration)
    device = moved(prepared, calibration.example, "it is reconstructed")
    store = UnitStore(Path(config.workspace) if config.workspace else None)
    reconstruction = reconstruct(
        quantized, inputs.to(device), settings, seed=config.seed, store=store, progress=_progress.get()
    )
    prepared.to(CPU)
    converted = convert(quantized)
    prepare_for_kernels(converted)
    return converted, reconstruction


@cache
def _warn(warning: str | None) -> None:
    """Once, and not with every trial."""
    if warning:
        logger.warning("%s", warning)


@torch.no_grad()
def _assert_finite(prepared: fx.GraphModule, images: Tensor) -> None:
    """No error can be taken of infinite outputs, such as those of classes that are masked out by -inf."""
    if not bool(prepared(images).isfinite().all()):
        raise ModelError(
            "the model returns values that are not finite for calibration images; where it masks classes out by -inf, let it "
            "take a finite number such as -1e4"
        )


def count_units(exported: nn.Module, config: MRECGConfig) -> int:
    """Units with fewer bits than `fallback_units` gives them: those of the granularity, before pairs of them are joined.

    Raises:
        ModelError: `config` names layers that the model does not have, or units that it cannot have; or the host's preparation
            changes what the model computes.
    """
    prepared = _prepare(exported)
    calibration: _Calibration = prepared.meta.pop(CALIBRATION)
    calibration.hook.remove()
    settings = config.reconstruction_settings()
    quantized = _installed(prepared, config.bit_plan(), settings)
    _assert_unchanged(prepared, calibration)
    return sum(can_be_raised(unit, quantized, settings) for unit in base_units(quantized, settings))


def _installed(prepared: fx.GraphModule, plan: BitPlan, settings: ReconstructionSettings) -> QuantizedGraph:
    try:
        quantized = install_quantizers(prepared, plan, settings)
        explicit_units(quantized.units, settings.explicit_units)  # units that the graph cannot have are said at once
    except ValueError as error:
        raise ModelError(str(error)) from error
    return quantized


@torch.no_grad()
def _assert_unchanged(prepared: fx.GraphModule, calibration: _Calibration) -> None:
    """With its quantizers open the graph must still be the float model: elsewhere this is where silent collapses began."""
    error = largest_difference(prepared(calibration.example), calibration.reference)
    if not error <= FLOAT_TOLERANCE:
        raise ModelError(
            f"the prepared graph differs from the float model by {error:.2g} of its largest output (at most "
            f"{FLOAT_TOLERANCE:g} is allowed); the model holds an operator that the host's preparation changes, or writes "
            "through a view of another tensor (x[:, 0] = 0)"
        )


@within_gpu_memory()
def _with_fallback(
    prepared: fx.GraphModule,
    inputs: Tensor,
    plan: BitPlan,
    settings: ReconstructionSettings,
    count: int,
    calibration: _Calibration,
) -> BitPlan:
    """The plan with 8 bits for the `count` units that most of what is off at the outputs comes from."""
    quantized = _installed(prepared, plan, settings)
    device = moved(prepared, calibration.example, "the sensitivity of its units is measured")
    raised = most_harmful(quantized, inputs.to(device), settings, count, _progress.get())
    return replace(plan, raised=frozenset(layer.name for unit in raised for layer in unit.layers))
