"""Tensors from a checkpoint file, and whether they are those of a model. Nothing is ever unpickled."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from inc_clusterq.errors import ModelError

logger = logging.getLogger(__name__)

SHOWN = 5
"""So many names are listed of each kind of misfit."""

SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt")
ENDINGS = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"

WRAPPINGS = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts put a state dict beside their optimiser's."""

AVERAGES = ("state_dict_ema", "model_ema", "ema")
"""Keys of moving averages of the weights; such a state dict is read where it is the only one."""

EXTRA = "_extra_state"
"""How torch ends the name of what a module adds to its state dict beside parameters and buffers; a model keeps its own."""

PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile leave in front of all names."""


def read_state(path: Path) -> dict[str, Tensor]:
    """The named tensors of a file, without the wrapping and the prefixes that training scripts leave behind."""
    if path.suffix not in SUFFIXES:
        raise ModelError(f"checkpoint {path}: the file name must end in {ENDINGS}")
    if not path.is_file():
        raise ModelError(f"checkpoint {path}: no such file")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"checkpoint {path}: holds more than tensors, or is damaged, and is not opened for safety; "
            "save `model.state_dict()` with torch.save or as safetensors"
        ) from error
    except Exception as error:  # a damaged file can make torch.load stumble anywhere
        told = " ".join(str(error).split()) or type(error).__name__
        if "TorchScript" in told:
            told = "it is a TorchScript archive; save `model.state_dict()` of the Python module it was made of"
        raise ModelError(f"checkpoint {path}: cannot be read: {told}") from error
    return _tensors(content, path)


def fit_state(module: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Load `state` into `module`; ModelError lists the names, shapes and types that do not fit it."""
    expected = {name: value for name, value in module.state_dict().items() if not name.endswith(EXTRA)}
    state = without_owner(state, expected)
    missing = [name for name in expected if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in expected]
    misshapen = [
        f"{name} {tuple(state[name].shape)} in place of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    mistyped = [
        f"{name} {state[name].dtype} in place of {tensor.dtype}"
        for name, tensor in expected.items()
        if name in state and tensor.is_floating_point() and not state[name].is_floating_point()
    ]
    kinds = (
        ("missing", missing),
        ("not in the model", unexpected),
        ("of another shape", misshapen),
        ("of another type", mistyped),
    )
    misfits = [f"{len(names)} {kind}: {_some(names)}" for kind, names in kinds if names]
    if misfits:
        raise ModelError(f"{origin} does not fit the model. Tensors " + "; ".join(misfits))
    module.load_state_dict(state, strict=False)


def _tensors(content: object, path: Path) -> dict[str, Tensor]:
    if isinstance(content, Mapping):
        found = [key for key in (*WRAPPINGS, *AVERAGES) if isinstance(content.get(key), Mapping)]
        if unused := [key for key in found[1:] if key in AVERAGES]:
            logger.warning(
                "checkpoint %s: %r is read; %r is there too and is not used: if you deploy that, save it to a file of its own",
                path,
                found[0],
                unused[0],
            )
        content = content[found[0]] if found else content
    if not isinstance(content, Mapping) or not content:
        raise ModelError(f"checkpoint {path}: holds {type(content).__name__}, not the named tensors of a state dict")
    state: dict[str, Tensor] = {}
    for name, value in content.items():
        if str(name).endswith(EXTRA):
            continue
        if not isinstance(value, Tensor):
            raise ModelError(
                f"checkpoint {path}: {name!r} is {type(value).__name__}, not a tensor; it must be a state dict, "
                f"alone or under one of the keys {', '.join((*WRAPPINGS, *AVERAGES))}"
            )
        state[str(name)] = value
    return _without_prefixes(state)


def _without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    while prefix := next((prefix for prefix in PREFIXES if state and all(name.startswith(prefix) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def without_owner(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Without the name of the module that held this one while it was trained, such as `model.`, where all names then fit."""
    owner = next(iter(state), "").partition(".")[0] + "."
    if not all(name.startswith(owner) for name in state):
        return state
    inner = _without_prefixes({name.removeprefix(owner): value for name, value in state.items()})
    return inner if inner.keys() <= expected.keys() else state


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
