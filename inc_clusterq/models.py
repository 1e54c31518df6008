"""The trained float model: found, loaded, and checked to be a classifier of the input that the YAML describes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from inc_clusterq.checkpoints import ENDINGS, fit_state, read_state, without_owner
from inc_clusterq.config import ModelConfig
from inc_clusterq.errors import ModelError
from inc_clusterq.fingerprint import fingerprint, ramp
from inc_clusterq.inputs import InputSpec
from inc_clusterq.modes import evaluated
from inc_clusterq.references import call_reference

logger = logging.getLogger(__name__)

SUSPICIOUS = 300.0
"""A span of normalised inputs beyond this is probably of a range and a std on different scales; raw pixels end at 255."""

TRANSFORMING = {"googlenet", "inception_v3"}
"""Networks of torchvision that scale their input or not, as published weights were trained; a checkpoint does not tell."""

ONE_INPUT = "; it may have one input tensor only: give what else it takes a default, or wrap it"

SUM_TOLERANCE = 1e-4
"""Non-negative outputs that add up to 1 within this are taken for probabilities."""


@dataclass(frozen=True)
class FloatModel:
    """A model that passed all checks; `module` is in eval mode, in float32, and has no gradients.

    `num_classes` is 0 and `problem` says why where it does not return class logits and need not.
    """

    name: str
    module: nn.Module
    input: InputSpec
    num_classes: int
    fingerprint: str
    problem: str = ""


def load_model(config: ModelConfig, *, any_output: bool = False) -> FloatModel:
    """Build the architecture, load its weights, check that it takes the input and, unless `any_output`, returns logits."""
    kind, _, name = config.architecture.partition(":")
    module = _from_torchvision(name, config) if kind == "torchvision" else _from_python(config)
    module = _unwrapped(module, config.architecture)
    tensors = (*module.named_parameters(), *module.named_buffers())
    if odd := [name for name, value in tensors if is_lazy(value) or value.is_meta or value.layout != torch.strided]:
        raise ModelError(
            f"{config.architecture}: {odd[0]} is {_oddness(dict(tensors)[odd[0]])}; give the trained model, with plain "
            "tensors on the CPU"
        )
    module = module.float().eval().requires_grad_(False)
    tensors = (*module.named_parameters(), *module.named_buffers())
    broken = [name for name, value in tensors if not bool(value.isfinite().all())]
    if broken:
        raise ModelError(f"{config.architecture}: {broken[0]} holds values that are not finite; the checkpoint is damaged")
    spec = config.input.spec()
    if (span := (spec.high - spec.low) / min(spec.std)) > SUSPICIOUS and set(spec.std) != {1.0}:
        logger.warning(
            "Normalised inputs span %.0f; are model.input.range, mean and std on one scale? [0, 255] goes with a std such as "
            "58.4, [0, 1] with 0.229",
            span,
        )
    output = read_output(module, spec)
    if output.problem and not any_output:
        raise ModelError(f"{output.problem}; {output.remedy}")
    return FloatModel(name.rpartition(":")[2], module, spec, output.num_classes, fingerprint(module, spec), output.problem)


def _oddness(tensor: Tensor) -> str:
    if is_lazy(tensor):
        return "not initialised yet"
    return "on the device meta" if tensor.is_meta else f"of layout {tensor.layout}"


def _unwrapped(module: nn.Module, origin: str) -> nn.Module:
    """The module inside DataParallel and what torch.compile returns, which cannot be exported themselves."""
    while isinstance(
        inner := getattr(module, "module" if isinstance(module, nn.DataParallel) else "_orig_mod", None), nn.Module
    ):
        module = inner
    if isinstance(module, torch.jit.ScriptModule):
        raise ModelError(
            f"{origin} returned a TorchScript module, which cannot be exported; give the Python module it was made of"
        )
    return module


@dataclass(frozen=True)
class Output:
    """What a model returns: logits of so many classes, or 0, what comes in their place, and what it should be."""

    num_classes: int
    problem: str = ""
    remedy: str = ""


def check_logits(module: nn.Module, spec: InputSpec) -> int:
    """Run a batch of two and return the number of classes; ModelError if they are not (N, classes) logits."""
    output = read_output(module, spec)
    if output.problem:
        raise ModelError(f"{output.problem}; {output.remedy}")
    return output.num_classes


def read_output(module: nn.Module, spec: InputSpec) -> Output:
    """Run a batch of two and tell what comes out; ModelError for what is wrong with any model, whatever its task."""
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if value.is_inference():
            raise ModelError(
                f"{name} was made in torch.inference_mode(), and nothing can be learned through it; make and load the model "
                "outside of that, or under torch.no_grad()"
            )
    for name, value in module.named_parameters():
        if value.is_floating_point() and value.dtype != torch.float32:
            raise ModelError(f"{name} holds {value.dtype}; give the model in float32, as model.float() makes it")
    batch = ramp(module, spec)
    given = batch.clone()
    output = _run(module, given)
    if not given.equal(batch):
        raise ModelError(
            "the model changes its input in place, and with it the images that it is compared on; "
            "let its first operation return a new tensor (no trailing underscore, no inplace=True)"
        )
    if not isinstance(output, Tensor):
        return Output(
            0, f"the model returns {type(output).__name__}", "it must return one tensor of class logits, (N, classes)"
        )
    if output.dim() != 2 or output.shape[0] != 2 or output.shape[1] < 2 or not output.is_floating_point():
        hint = "; flatten it in the model" if output.dim() > 2 and output.shape[2:].numel() == 1 else ""
        return Output(
            0,
            f"the model returns {output.dtype} of shape {tuple(output.shape)} for 2 samples",
            f"it must return class logits, floats of shape (2, classes) with at least 2 classes{hint}",
        )
    if not bool(output.isfinite().all()):
        raise ModelError("the model returns values that are not finite; check its weights, model.input.range and .std")
    if bool((output >= 0).all()) and bool(((output.sum(1) - 1).abs() < SUM_TOLERANCE).all()):
        return Output(0, "the model returns probabilities", "it must return class logits: take the softmax out of the model")
    if not _same(_run(module, batch.clone()), output):
        raise ModelError(
            "the model returns other values for the same input each time; in evaluation it must draw no random numbers, as "
            "functional.dropout does without training=self.training"
        )
    alone = _run(module, batch[:1].clone())
    if alone.shape != (1, output.shape[1]):
        raise ModelError(
            f"the model returns shape {tuple(alone.shape)} for 1 sample and {tuple(output.shape)} for 2; the first axis must "
            "be there for 1 as well: write flatten(1) in place of squeeze()"
        )
    if not _same(alone, output[:1]):
        raise ModelError(
            "the model's output for a sample depends on what else is in the batch, so its accuracy would too; in evaluation "
            "take no mean over axis 0, and give every BatchNorm running statistics (track_running_stats=True)"
        )
    return Output(output.shape[1])


def _same(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def _run(module: nn.Module, batch: Tensor) -> Any:
    """The output for a batch; ModelError where the model takes none such."""
    try:
        with torch.no_grad(), evaluated(module):
            return module(batch)
    except Exception as failure:  # the user's own model: anything can come out of it
        raise ModelError(
            f"the model does not take an input of shape {tuple(batch.shape)}, model.input.shape is {list(batch.shape[1:])}: "
            f"{type(failure).__name__}: {' '.join(str(failure).split())}" + (ONE_INPUT if _inputs(module) > 1 else "")
        ) from failure


def _inputs(module: nn.Module) -> int:
    """So many arguments a model cannot do without."""
    kinds = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    given = signature(module.forward).parameters.values()
    return sum(argument.kind in kinds and argument.default is Parameter.empty for argument in given)


def _from_python(config: ModelConfig) -> nn.Module:
    module = call_reference(config.architecture, config.folder, ModelError)
    if not isinstance(module, nn.Module):
        raise ModelError(f"{config.architecture} returned {type(module).__name__}; it must return a torch.nn.Module")
    if config.checkpoint is not None:
        if any(is_lazy(value) for value in (*module.parameters(), *module.buffers())):
            _run(module, torch.zeros(2, *config.input.spec().shape))  # which gives them the shapes that they need
        fit_state(module, read_state(config.checkpoint), f"checkpoint {config.checkpoint}")
    return module


def _from_torchvision(name: str, config: ModelConfig) -> nn.Module:
    import torchvision  # here: whoever brings a model of their own need not pay for it

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        near = get_close_matches(name, known, 3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
        raise ModelError(f"torchvision has no classification model {name!r}; {hint}")
    if config.weights is None:
        raise ModelError(
            f"model.weights is not given and torchvision's {name} would be untrained; "
            "name a checkpoint file or published weights"
        )
    if config.checkpoint is None:
        return _published(name, config.weights)
    if name in TRANSFORMING:
        raise ModelError(
            f"{name} scales its input where it was made from published weights (transform_input=True), and not where it was "
            "made without; a checkpoint does not tell. Name a function that makes it as it was: python:package.module:function"
        )
    read = read_state(config.checkpoint)
    module: nn.Module = torchvision.models.get_model(name, weights=None)
    expected = module.state_dict()
    state = without_owner(read, expected)
    # A fine-tuned model differs in its number of classes, which the last tensor of every classifier there shows.
    last = list(expected)[-1]
    if last in state and state[last].shape[:1] != expected[last].shape[:1]:
        module = torchvision.models.get_model(name, weights=None, num_classes=len(state[last]))
    try:
        fit_state(module, state, f"checkpoint {config.checkpoint}")
    except ModelError as misfit:
        raise ModelError(
            f"{misfit}. For a network of torchvision that was changed, name a function that makes it: "
            "python:package.module:function"
        ) from misfit
    return module


def _published(name: str, weights_name: str) -> nn.Module:
    import torchvision

    choices = torchvision.models.get_model_weights(name)
    if weights_name not in choices.__members__:
        raise ModelError(
            f"model.weights is {weights_name!r}; for {name} it must be one of {', '.join(choices.__members__)}, "
            f"or a file that ends in {ENDINGS}"
        )
    weights = choices[weights_name]
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    if not cached.is_file():
        raise ModelError(
            f"the weights {weights} are not in torch's cache ({cached}). Nothing is downloaded here: "
            f"put the file there, or run torchvision.models.get_model({name!r}, weights={weights_name!r}) once where "
            "downloads are allowed"
        )
    with _tensors_only():
        module: nn.Module = torchvision.models.get_model(name, weights=weights)
    return module


@contextmanager
def _tensors_only() -> Iterator[None]:
    """torchvision loads its own weights without `weights_only`; torch's own switch insists on it."""
    switch = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(switch)
    os.environ[switch] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[switch]
        else:
            os.environ[switch] = before
